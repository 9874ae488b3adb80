"""Evaluation with the shipped tokenizer and a random model: what is counted, and that batches do not matter."""

import dataclasses
import json

import jax
import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.tokenizer import Tokenizer
from rlhf.sampling import completions, evaluate
from rlhf.sampling.completions import Completion, complete, never_drawn, sample_rows
from rlhf.sampling.evaluate import Evaluation, evaluate_prompts, interval
from rlhf.sampling.generate import generate
from rlhf.sampling.methods import Greedy, Sample


@dataclasses.dataclass(frozen=True)
class Prompt:
    token_ids: tuple[int, ...]
    answer: str | None
    row: int
    fields: dict = dataclasses.field(default_factory=dict)


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
    return model, {"model": model.initialise(jax.random.key(0))}, tokenizer


def prompts_of(tokenizer, answers):
    texts = ["How many?", "Tom has 3 apples and buys 4. How many has he?", "What is 2 + 2?"]
    return [
        Prompt((tokenizer.bos, *tokenizer.encode(texts[i % 3])), answer, 10 + i) for i, answer in enumerate(answers)
    ]


def test_answers_are_judged_and_counted(parts, monkeypatch):
    """With canned answers: right, right in another form, wrong, no form, and cut."""
    canned = [
        Completion("2 + 2 = 4\n#### 4", 9, False),
        Completion("#### 1,000.0.", 7, False),
        Completion("#### 5", 3, False),
        Completion("it is 4", 5, False),
        Completion("so so so so", 16, True),
    ]
    monkeypatch.setattr(evaluate, "complete", lambda *args, **settings: canned)
    prompts = prompts_of(parts[2], ["so\n#### 4", "1000", "4", "#### 4", "4"])
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
    prompts = prompts_of(parts[2], ["4"] * 5)
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
    model, params, tokenizer = parts
    forbidden = never_drawn(tokenizer, model.architecture.vocab_size)
    assert {tokenizer.pad, tokenizer.bos, tokenizer.start_of_turn, tokenizer.start_of_image} <= set(forbidden)
    assert not {*tokenizer.stop_ids, *tokenizer.encode("a 1\n")} & set(forbidden)
    beyond = never_drawn(tokenizer, tokenizer.n_vocab + 2)
    assert beyond[-2:] == (tokenizer.n_vocab, tokenizer.n_vocab + 1)
    seen = []

    def generate_and_keep(*args, **settings):
        seen.append((generate(*args, **settings), settings))
        return seen[-1][0]

    monkeypatch.setattr(completions, "generate", generate_and_keep)
    settings = {"method": Sample(temperature=2.0), "max_new_tokens": 16, "key": jax.random.key(0)}
    answers = complete(model, params, tokenizer, prompts_of(tokenizer, [None] * 5), **settings)
    generation, asked = seen[0]
    assert tuple(asked["stop_ids"]) == (tokenizer.eos, tokenizer.end_of_turn)
    assert list(asked["rows"]) == [10, 11, 12, 13, 14]
    for answer, ids, n in zip(answers, generation.answers(), generation.n_tokens, strict=True):
        assert not set(ids) & set(forbidden)
        assert answer.text == tokenizer.decode(ids)
        assert answer.n_tokens == n == len(ids) + (not answer.is_truncated)


def test_intervals():
    """Wilson, 1927, by hand: 8 of 10, none of 10, all of 10; and nothing tried."""
    assert interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert interval(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert interval(0, 0) == (0.0, 1.0)


def test_references_are_checked_before_anything_runs(parts):
    tokenizer = parts[2]
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
    prompts = prompts_of(parts[2], ["#### 4", None])
    rows = sample_rows(*parts, prompts, step=5, seed=1, max_new_tokens=8)
    assert rows == sample_rows(*parts, prompts, step=5, seed=1, max_new_tokens=8)
    assert [list(row) for row in rows] == [["step", "row", "prompt", "greedy", "sampled", "answer"]] * 2
    assert [(row["step"], row["row"], row["answer"]) for row in rows] == [(5, 10, "#### 4"), (5, 11, None)]
    later = sample_rows(*parts, prompts, step=6, seed=1, max_new_tokens=8)
    assert [row["greedy"] for row in later] == [row["greedy"] for row in rows]
    assert all(a["sampled"] != b["sampled"] for a, b in zip(later, rows, strict=True))
    other = sample_rows(*parts, prompts, step=5, seed=2, max_new_tokens=8)
    assert all(a["sampled"] != b["sampled"] for a, b in zip(other, rows, strict=True))
    alone = sample_rows(*parts, prompts[1:], step=5, seed=1, max_new_tokens=8)
    assert alone == rows[1:]
    greedy = complete(*parts, prompts, method=Greedy(), max_new_tokens=8, key=jax.random.key(9))
    assert [row["greedy"] for row in rows] == [c.text for c in greedy]
