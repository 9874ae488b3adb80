"""The command line: what a user types, and what comes back when it is wrong."""

import json

import pytest


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["algorithm.betta=0.1", "algorithm=dpo"], "algorithm.betta: unknown key; did you mean algorithm.beta?"),
        (["trainer.max_step=3"], "trainer.max_step: unknown key; did you mean trainer.max_steps"),
        (["modle=tiny"], "modle: unknown key; did you mean model?"),
        (["beta=0.1", "algorithm=dpo"], "beta: unknown key; did you mean algorithm.beta?"),
        (["algorithm=dop"], "algorithm=dop: there is no such algorithm; did you mean dpo"),
        (["dataset=gsm8"], "dataset=gsm8: there is no such dataset; did you mean gsm8k?"),
        (["algorithm.learning_rate=fast"], "algorithm.learning_rate='fast' of SFT must be a number"),
        (["reward=[gsm8k,lenght]"], "reward=lenght: there is no such reward; did you mean length?"),
        (
            ["algorithm.optimizer=lion"],
            "must be an object of class Optimizer (or a subclass), given as '{_target_: rlhf.ops.optimizers.Lion, …}'",
        ),
        (
            ["algorithm.schedule._target_=rlhf.ops.optimizers.Lineal"],
            "rlhf.ops.optimizers has no Lineal; did you mean Lin",
        ),
        (["algorithm.batch_size=2.5"], "algorithm.batch_size=2.5 of SFT must be an integer"),
        (["algorithm.learning_rate=-1"], "algorithm.learning_rate=-1 of SFT must be at least 0"),
        (["algorithm.learning_rate=inf"], "algorithm.learning_rate=inf of SFT must be at least 0 and finite"),
        (["algorithm=dpo", "algorithm.beta=nan"], "algorithm.beta=nan of DPO must be above 0 and finite"),
        (["algorithm.clip_norm=nan"], "algorithm.clip_norm=nan of SFT must be above 0 and a number"),
        (["seed=x"], "seed='x' must be an integer"),
        (["seed=-1"], "seed=-1 must be an integer from 0 to 2^32 - 1"),
        (["trainer=null"], "trainer=None must be a section"),
        (["hydra.run.dir=/dev/null/x"], "/dev/null"),
        (["prompts=[Wie viele Äpfel?]", "task=generate"], "letters beyond a to z, and ~, stand in quotes"),
        (
            ["algorithm.batch_size=10", "algorithm.microbatch_size=4"],
            "microbatch_size=4 must divide the 10 rows of an optimizer step (batch_size 10 / minibatches 1); try 2",
        ),
        (["hardware.mesh.fsdp=3"], "algorithm.microbatch_size=8 must be a multiple of the 3 parts"),
        (["hardware.compute_dtype=float16"], "hardware.compute_dtype=float16: Gemma 3's activations"),
        (["trainer.max_steps=null", "trainer.epochs=null"], "trainer.max_steps and trainer.epochs are both none"),
        (["dataset=sft_jsonl"], "dataset.path has no value yet: give one as dataset.path=…"),
        (["dataset=gsm8k", "algorithm=dpo"], "preference"),
        (["resume=nowhere/at/all"], "resume=nowhere/at/all: there is no run in this folder"),
        (["model.checkpoint=nowhere"], "no checkpoint in nowhere"),
        (["model.vocab_size=100"], "model.vocab_size=100 must be at least the"),
        (
            ["algorithm.optimizer._target_=rlhf.ops.optimizers.RMSProp"],
            "algorithm.optimizer.b1 is no setting of RMSProp; there are: decay, eps, weight_decay (an object in "
            "the place of another is given whole: 'algorithm.optimizer={_target_: rlhf.ops.optimizers.RMSProp, …}')",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_get_one_clear_message(command, words, expected):
    done = command(*words)
    assert done.code == 1
    assert expected in done.output
    assert "Traceback" not in done.output


def test_help_and_config(command):
    shown = command("--help")
    assert shown.code == 0
    assert "algorithm: " in shown.output
    assert "dpo" in shown.output
    config = command("--cfg", "job", "algorithm=dpo")
    assert "beta: 0.1" in config.output
    assert "b1: 0.9" in config.output
    other = command("--cfg", "job", "algorithm.optimizer={_target_: rlhf.ops.optimizers.RMSProp, decay: 0.8}")
    assert "decay: 0.8" in other.output
    assert "b1:" not in other.output  # nothing stays of what was there before


def test_a_run_writes_its_folder(command, small, tmp_path):
    done = command(*small, "hydra.run.dir=run", "trainer.samples_every=2")
    assert done.code == 0, done.output
    assert "4 rows a step = 1 minibatch × 1 microbatch of 4; 1 optimizer step a step; 2 steps" in done.output
    assert "devices: 1 of 8 × cpu" in done.output
    folder = tmp_path / "run"
    names = {path.name.split(".1")[0] for path in folder.iterdir()}
    assert {".hydra", "config.json", "log.txt", "metrics.jsonl", "samples.jsonl", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"val/nll", "val/accuracy"} <= rows[0].keys()
    assert {"loss", "grad_norm", "learning_rate", "n_tokens", "seconds", "tokens_per_second"} <= rows[1].keys()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2}


def test_a_folder_with_a_run_is_not_written_over(command, small):
    assert command(*small, "hydra.run.dir=run").code == 0
    again = command(*small, "hydra.run.dir=run")
    assert again.code == 1
    assert "holds a run; resume=auto goes on with it" in again.output


def test_other_settings_are_refused_on_resume_with_the_difference(command, small):
    assert command(*small, "hydra.run.dir=run").code == 0
    other = command(*small, "hydra.run.dir=run", "resume=auto", "algorithm.learning_rate=1", "trainer.log_every=5")
    assert other.code == 1
    assert "algorithm.learning_rate: 2e-05 in the run, 1 now" in other.output
    assert "log_every" not in other.output
    same = command(*small, "resume=run", "trainer.log_every=5")
    assert same.code == 0, same.output


def test_a_users_own_files(command, small, tmp_path):
    (tmp_path / "mine" / "algorithm").mkdir(parents=True)
    (tmp_path / "mine" / "algorithm" / "mine.yaml").write_text(
        "_target_: my_algorithm.Half\nlearning_rate: 0.001\nbatch_size: 4\nmicrobatch_size: 4\n"
    )
    (tmp_path / "my_algorithm.py").write_text(
        "from rlhf.algorithms.sft import SFT\nfrom rlhf.config import config\n\n\n"
        "@config\nclass Half(SFT):\n"
        "    def loss(self, model, params, batch):\n"
        "        value, metrics = super().loss(model, params, batch)\n"
        "        return value / 2, metrics\n"
    )
    done = command("--config-dir", "mine", *small, "algorithm=mine", "hydra.run.dir=run")
    assert done.code == 0, done.output
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["loss"] == pytest.approx(row["nll"] / 2)


@pytest.mark.parametrize("debug", ["fast", "nojit", "overfit"])
def test_debug_choices_run(command, small, debug):
    words = [word for word in small if not (debug == "overfit" and word.startswith(("evaluation", "trainer.eval")))]
    words += ["model.layers=2", "model.pattern=2"] if debug == "nojit" else []  # a look at each takes its time
    done = command(*words, f"debug={debug}", "hydra.run.dir=run")
    assert done.code == 0, done.output


def test_debug_shapes_shows_what_is_trained_on(command, small):
    done = command(*small, "debug=shapes", "hydra.run.dir=run")
    assert done.code == 0, done.output
    assert "<start_of_turn>" in done.output
    assert "trained on" in done.output
    assert "(batch × time)" in done.output


def test_nojit_raises_where_a_nan_is_made(command, small):
    words = [word for word in small if not word.startswith("trainer.eval")]
    done = command(*words, "debug=nojit", "trainer.eval_rows=0", "evaluation.rows=0", "algorithm.learning_rate=1e38")
    assert done.code == 1
    assert "FloatingPointError" in done.output or "not finite" in done.output or "nan" in done.output.lower()
