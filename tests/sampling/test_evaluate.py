"""Evaluation with the shipped tokenizer and a random model: what is counted, and that batches do not matter."""

import dataclasses
import json
import types

import jax
import pytest

from rlhf.config import config
from rlhf.errors import ConfigError, DataError
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.tokenizer import Tokenizer
from rlhf.rewards.base import Failed, OnError, Reward
from rlhf.rewards.extract import Tagged, Whole
from rlhf.rewards.format import Format
from rlhf.rewards.length import Length
from rlhf.rewards.weighted import Rewards
from rlhf.sampling import sampler as sampling
from rlhf.sampling.evaluate import Evaluation, evaluate_prompts, interval
from rlhf.sampling.generate import generate
from rlhf.sampling.methods import Beam, Greedy, Sample
from rlhf.sampling.presets import method_name
from rlhf.sampling.sampler import Completion, Sampler, never_drawn
from rlhf.sampling.samples import sample_rows
from rlhf.sampling.settings import SamplingSettings


@dataclasses.dataclass(frozen=True)
class Prompt:
    token_ids: tuple[int, ...]
    answer: str | None
    row: int
    fields: dict = dataclasses.field(default_factory=dict)
    soft_tokens: tuple = ()
    pictures: tuple = ()


@pytest.fixture(scope="module")
def parts():
    tokenizer = Tokenizer()
    model = Gemma3(
        Architecture(
            vocab_size=tokenizer.n_vocab,
            width=32,
            ff_width=48,
            layers=2,
            heads=2,
            kv_heads=1,
            head_width=16,
            query_scale=0.25,
            window=8,
        )
    )
    return Sampler(model, tokenizer), {"model": jax.device_put(model.initialise(0))}


def prompts_of(tokenizer, answers):
    texts = ["How many?", "Tom has 3 apples and buys 4. How many has he?", "What is 2 + 2?"]
    return [
        Prompt((tokenizer.bos, *tokenizer.encode(texts[i % 3])), answer, 10 + i) for i, answer in enumerate(answers)
    ]


def test_answers_are_judged_and_counted(parts, monkeypatch):
    """With canned answers: right, right in another form, wrong, no form, and cut."""
    canned = [
        Completion("2 + 2 = 4\n#### 4", 9),
        Completion("#### 1,000.0.", 7),
        Completion("#### 5", 3),
        Completion("it is 4", 5),
        Completion("so so so so", 16, "length"),
    ]
    sampler = parts[0]
    rollout = types.SimpleNamespace(completions=canned)
    monkeypatch.setattr(Sampler, "__call__", lambda *args, **settings: rollout)
    prompts = prompts_of(sampler.tokenizer, ["so\n#### 4", "1000", "4", "#### 4", "4"])
    summary, rows = evaluate_prompts(*parts, prompts, Evaluation())
    assert summary == {
        "n": 5,
        "accuracy": 2 / 5,
        "accuracy_low": pytest.approx(0.117621, abs=1e-6),
        "accuracy_high": pytest.approx(0.769276, abs=1e-6),
        "format_accuracy": 3 / 5,
        "format_accuracy_low": pytest.approx(1 - 0.769276, abs=1e-6),
        "format_accuracy_high": pytest.approx(1 - 0.117621, abs=1e-6),
        "mean_tokens": 8.0,
        "truncated": 1 / 5,
    }
    assert [row["is_correct"] for row in rows] == [True, True, False, False, False]
    assert [row["extracted"] for row in rows] == ["4", "1000.0", "5", None, None]
    assert [row["expected"] for row in rows] == ["4", "1000", "4", "4", "4"]
    assert [row["row"] for row in rows] == [10, 11, 12, 13, 14]
    assert rows[0]["prompt"] == "<bos>How many?"
    assert rows[4]["is_truncated"]
    json.dumps([summary, rows])  # both go to a file


def test_the_batch_size_changes_nothing(parts):
    prompts = prompts_of(parts[0].tokenizer, ["4"] * 5)
    settings = {"max_new_tokens": 8, "method": Sample(), "seed": 3}
    one = evaluate_prompts(*parts, prompts, Evaluation(batch_size=2, **settings))
    assert one == evaluate_prompts(*parts, prompts, Evaluation(batch_size=5, **settings))
    assert len({row["completion"] for row in one[1]}) == 5
    first = evaluate_prompts(*parts, prompts, Evaluation(rows=2, batch_size=5, **settings))
    assert first[1] == one[1][:2]
    assert first[0]["n"] == 2
    other = evaluate_prompts(*parts, prompts, Evaluation(batch_size=5, **{**settings, "seed": 4}))
    assert other[1] != one[1]


def test_only_ends_and_text_can_be_drawn(parts, monkeypatch):
    sampler, params = parts
    tokenizer, vocab = sampler.tokenizer, sampler.model.architecture.vocab_size
    forbidden = never_drawn(tokenizer, vocab)
    assert {tokenizer.pad, tokenizer.bos, tokenizer.start_of_turn, tokenizer.start_of_image} <= set(forbidden)
    assert not {*tokenizer.stop_ids, *tokenizer.encode("a 1\n")} & set(forbidden)
    beyond = never_drawn(tokenizer, tokenizer.n_vocab + 2)
    assert beyond[-2:] == (tokenizer.n_vocab, tokenizer.n_vocab + 1)
    asked = {}

    def generate_and_keep(*args, **settings):
        asked.update(settings)
        return generate(*args, **settings)

    monkeypatch.setattr(sampling, "generate", generate_and_keep)
    rollout = sampler(params, prompts_of(tokenizer, [None] * 5), n=2, method=Sample(temperature=2.0), max_new_tokens=16)
    assert tuple(asked["stop_ids"]) == (tokenizer.eos, tokenizer.end_of_turn)
    assert list(asked["rows"]) == [10, 11, 12, 13, 14]
    assert len(rollout.completions) == 10
    g = rollout.generation
    for answer, ids, n in zip(rollout.completions, g.answers(), g.n_tokens, strict=True):
        assert not set(ids) & set(forbidden)
        assert answer.text == tokenizer.decode(ids)
        assert answer.n_tokens == n == len(ids) + (not answer.is_truncated)
    metrics = rollout.metrics()
    assert metrics["sampling/mean_tokens"] == g.n_tokens.mean()
    assert metrics["sampling/tokens_per_second"] == pytest.approx(g.n_tokens.sum() / metrics["sampling/seconds"])
    assert 0 < metrics["sampling/utilisation"] <= 1


def test_a_stop_text_ends_an_answer_exactly_where_it_begins(parts):
    """Whichever token completes it: the text before it stays, and the noise of other rows is as it was."""
    sampler, params = parts
    prompts = prompts_of(sampler.tokenizer, [None] * 6)
    settings = {"method": Sample(temperature=1.5), "max_new_tokens": 40}
    free = sampler(params, prompts, **settings)
    stops = [free.texts[0][5:8], free.texts[3][9:12]]
    stopped = sampler(params, prompts, stop=stops, **settings)
    n_stopped = 0
    for row, (before, after) in enumerate(zip(free.completions, stopped.completions, strict=True)):
        places = [before.text.find(stop) for stop in stops if stop in before.text]
        if not places:
            assert after == before
            continue
        n_stopped += 1
        assert after.finish_reason == "stop_text"
        assert after.text == before.text[: min(places)]
        ids = stopped.generation.tokens[row, : after.n_tokens].tolist()
        assert any(stop in sampler.tokenizer.decode(ids) for stop in stops)
        assert not any(stop in sampler.tokenizer.decode(ids[:-1]) for stop in stops)
        assert not stopped.generation.tokens[row, after.n_tokens :].any()
    assert n_stopped >= 2
    with pytest.raises(ConfigError, match="stop holds an empty text"):
        sampler(params, prompts, stop=[""], **settings)


def test_narrow_weights_are_near_the_trainers_numbers(parts):
    sampler, params = parts
    prompts = prompts_of(sampler.tokenizer, [None] * 3)
    gaps = {}
    for kind in (None, "bfloat16", "int8"):
        narrow = Sampler(sampler.model, sampler.tokenizer, SamplingSettings(weights=kind))
        rollout = narrow(params, prompts, method=Sample(temperature=0.8), max_new_tokens=16)
        gaps[kind] = narrow.difference(params, prompts, rollout, 0.8)
    assert gaps[None] < 1e-5
    assert 1e-5 < gaps["bfloat16"] < 0.02
    assert 1e-5 < gaps["int8"] < 0.05


def test_several_passes_by_hand(parts, monkeypatch):
    """Three answers to each of two prompts: 2 of 3 right, the other one wrong; and none right."""
    texts = ["#### 4", "#### 5", "#### 4.0", "#### 1", "#### 1", "no"]
    canned = types.SimpleNamespace(completions=[Completion(text, 3) for text in texts])
    monkeypatch.setattr(Sampler, "__call__", lambda *args, **settings: canned if settings["n"] == 3 else None)
    prompts = prompts_of(parts[0].tokenizer, ["4", "2"])
    summary, rows = evaluate_prompts(*parts, prompts, Evaluation(passes=3, method="standard"))
    assert [(row["row"], row["pass"], row["is_correct"]) for row in rows] == [
        (10, 0, True), (10, 1, False), (10, 2, True), (11, 0, False), (11, 1, False), (11, 2, False),
    ]  # fmt: skip
    assert summary["n"] == 2
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["pass@1"] == pytest.approx(1 / 3)
    assert summary["pass@2"] == summary["pass@3"] == summary["maj@3"] == 0.5
    assert summary["format_accuracy"] == pytest.approx(5 / 6)
    for name in ("accuracy", "format_accuracy", "pass@1", "pass@2", "pass@3", "maj@3"):
        assert summary[f"{name}_low"] < summary[name] < summary[f"{name}_high"]


def test_presets_are_what_they_are_called():
    assert Evaluation(method="greedy").drawn_by == Evaluation().drawn_by == Greedy()
    assert Evaluation(method="standard").drawn_by == Sample(temperature=0.7, top_k=50, top_p=0.95)
    assert Evaluation(method="liberal").drawn_by == Sample(temperature=0.85, top_k=2000)
    assert method_name(Sample(temperature=0.85, top_k=2000.0)) == "liberal"
    assert "temperature=0.9" in method_name(Sample(temperature=0.9))
    with pytest.raises(
        ConfigError, match=r"method='wild' of Evaluation must be .*one of 'greedy', 'standard', 'liberal'"
    ):
        Evaluation(method="wild")
    for method in (Greedy(), Beam(), Sample(temperature=0.0)):
        with pytest.raises(ConfigError, match="passes=2 of Evaluation needs a method that draws"):
            Evaluation(passes=2, method=method)


def test_rewards_go_into_rows_and_summary(parts):
    """Also of prompts without a reference, where nothing else is measured."""
    prompts = prompts_of(parts[0].tokenizer, [None] * 2)
    rewards = Rewards({"length": Length(target=4), "format": Format(weight=2.0)})
    summary, rows = evaluate_prompts(*parts, prompts, Evaluation(max_new_tokens=4), rewards)
    assert "accuracy" not in summary
    assert summary["rewards/length/mean"] == -abs(summary["mean_tokens"] - 4) / 4
    assert [row["rewards/length"] for row in rows] == [-abs(row["n_tokens"] - 4) / 4 for row in rows]
    assert summary["rewards/length/errors"] == 0
    assert all(row["reward"] == row["rewards/length"] + 2 * row["rewards/format"] for row in rows)


def test_a_masked_answer_has_no_reward(parts):
    prompts = prompts_of(parts[0].tokenizer, [None] * 2)
    summary, rows = evaluate_prompts(*parts, prompts, Evaluation(max_new_tokens=4), Rewards({"odd": Odd()}))
    assert [row["rewards/odd"] for row in rows] == [None, 1.0]
    assert [row["reward"] for row in rows] == [None, 1.0]
    assert summary["rewards/odd/errors"] == 1
    json.dumps(rows)


@config
class Odd(Reward):
    """Can't judge prompts of an even row."""

    on_error: OnError = "mask"

    def __call__(self, answers, step):
        assert all(a.answer_ids and a.prompt_ids and len(a.answer_ids) == a.n_tokens for a in answers)
        return [1.0 if answer.row % 2 else Failed("even") for answer in answers]


def test_another_extractor(parts, monkeypatch):
    canned = types.SimpleNamespace(completions=[Completion("<answer>Red.</answer>", 9), Completion("red", 2)])
    monkeypatch.setattr(Sampler, "__call__", lambda *args, **settings: canned)
    prompts = prompts_of(parts[0].tokenizer, ["red", "red"])
    tagged = evaluate_prompts(*parts, prompts, Evaluation(extractor=Tagged()))[0]
    whole = evaluate_prompts(*parts, prompts, Evaluation(extractor=Whole()))[0]
    assert (tagged["accuracy"], whole["accuracy"]) == (0.5, 0.5)
    assert (tagged["format_accuracy"], whole["format_accuracy"]) == (0.5, 1.0)


def test_beam_search_in_an_evaluation(parts):
    prompts = prompts_of(parts[0].tokenizer, ["4"] * 3)
    settings = Evaluation(method=Beam(width=3), max_new_tokens=6)
    summary, rows = evaluate_prompts(*parts, prompts, settings)
    assert summary["n"] == 3
    assert rows == evaluate_prompts(*parts, prompts, settings)[1]


def test_intervals():
    """Wilson, 1927, by hand: 8 of 10, none of 10, all of 10; and nothing tried."""
    assert interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert interval(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert interval(0, 0) == (0.0, 1.0)


def test_references_are_checked_before_anything_runs(parts):
    tokenizer = parts[0].tokenizer
    with pytest.raises(DataError, match="row 11 has no reference answer"):
        evaluate_prompts(*parts, prompts_of(tokenizer, ["4", None]), Evaluation())
    with pytest.raises(DataError, match="row 10: the reference answer 'Paris' holds no number"):
        evaluate_prompts(*parts, prompts_of(tokenizer, ["Paris"]), Evaluation())
    with pytest.raises(DataError, match="no prompt to evaluate on"):
        evaluate_prompts(*parts, [], Evaluation())


@pytest.mark.parametrize(("name", "least"), [("rows", 0), ("max_new_tokens", 1), ("batch_size", 1)])
def test_settings_out_of_range_are_refused(name, least):
    with pytest.raises(ConfigError, match=f"{name}={least - 1} of Evaluation must be at least {least}"):
        Evaluation(**{name: least - 1})


def test_a_blank_marker_is_refused():
    with pytest.raises(ConfigError, match="marker of Evaluation must not be blank"):
        Evaluation(marker=" ")


def test_sample_rows_are_a_function_of_seed_and_step(parts):
    prompts = prompts_of(parts[0].tokenizer, ["#### 4", None])
    rows = sample_rows(*parts, prompts, step=5, max_new_tokens=8)
    assert rows == sample_rows(*parts, prompts, step=5, max_new_tokens=8)
    assert [list(row) for row in rows] == [["step", "row", "prompt", "greedy", "sampled", "answer"]] * 2
    assert [(row["step"], row["row"], row["answer"]) for row in rows] == [(5, 10, "#### 4"), (5, 11, None)]
    later = sample_rows(*parts, prompts, step=6, max_new_tokens=8)
    assert [row["greedy"] for row in later] == [row["greedy"] for row in rows]
    assert all(a["sampled"] != b["sampled"] for a, b in zip(later, rows, strict=True))
    sampler = Sampler(parts[0].model, parts[0].tokenizer, seed=2)
    other = sample_rows(sampler, parts[1], prompts, step=5, max_new_tokens=8)
    assert all(a["sampled"] != b["sampled"] for a, b in zip(other, rows, strict=True))
    alone = sample_rows(*parts, prompts[1:], step=5, max_new_tokens=8)
    assert alone == rows[1:]
    greedy = parts[0](parts[1], prompts, method=Greedy(), max_new_tokens=8, step=9)
    assert [row["greedy"] for row in rows] == greedy.texts
