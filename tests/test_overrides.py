"""The words of a command line before Hydra reads them."""

from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf.overrides import with_fixed_as_choices, with_quotes


def test_fixed_settings_of_a_swept_group_are_sweeps_over_one_value():
    words = ["-m", "algorithm=dpo,ipo", "algorithm.beta=0.2", "dataset.path=a b", "algorithm.learning_rate=1e-6,1e-5"]
    found = with_fixed_as_choices(words)
    assert found == [*words[:2], "algorithm.beta=choice(0.2)", *words[3:]]
    assert with_fixed_as_choices(["-m", "dataset=a,b", "dataset.path='x, y'"])[-1] == "dataset.path=choice('x, y')"
    anything = with_fixed_as_choices(["-m", "experiment=a,b", "algorithm.beta=0.2", "trainer.epochs=null", "seed=1"])
    assert anything[2:] == ["algorithm.beta=choice(0.2)", "trainer.epochs=null", "seed=1"]
    for same in (words[1:], ["-m", "seed=1,2", "algorithm.beta=0.2"], ["-m", "algorithm=dpo,ipo", "hydra.sweep.dir=x"]):
        assert with_fixed_as_choices(same) == same
    whole = "algorithm.optimizer={_target_: a.B, decay: 0.8}"
    for word in [*found[1:], *anything[2:], *with_fixed_as_choices(["-m", "algorithm=a,b", whole])[1:]]:
        OverridesParser.create().parse_override(word)


def test_plain_values_with_other_letters_stand_in_quotes():
    words = ["model.checkpoint=/tmp/ünï dir/sft", "prompts=Wie viele Äpfel?", "model.checkpoint=~/x", "name=plain/x.y"]
    found = with_quotes(words)
    assert found == [*(word.replace("=", "='", 1) + "'" for word in words[:3]), words[3]]
    assert [OverridesParser.create().parse_override(word).value() for word in found[:3]] == [
        "/tmp/ünï dir/sft",
        "Wie viele Äpfel?",
        "~/x",
    ]
    for same in (["prompts=['Äpfel']"], ["-m", "a.b='ü'"], ["~trainer.epochs"]):
        assert with_quotes(same) == same
