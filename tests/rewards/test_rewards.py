"""The rules in the package by hand, and several rewards added up: what is checked, counted and told."""

import json
import time

import numpy as np
import pytest

from rlhf.config import config
from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.rewards.base import Answered, Failed, OnError, Reward
from rlhf.rewards.format import Format
from rlhf.rewards.gsm8k import GSM8K
from rlhf.rewards.length import Length
from rlhf.rewards.random import Random
from rlhf.rewards.repetition import Repetition
from rlhf.rewards.weighted import Rewards


def answered(text, reference: str | None = "42", n_tokens=8, row=7, **settings):
    return Answered("?", text, reference, {}, n_tokens, False, row=row, **settings)


def test_gsm8k_pays_for_the_number_and_a_little_for_the_form():
    answers = [answered(t) for t in ("6*7=42\n#### 42", "#### 41", "it is 42", "#### 1\n#### 42.0")]
    assert GSM8K()(answers, 0) == [1.0, 0.1, 0.0, 1.0]
    assert GSM8K(correct=2, format=-1, wrong=-2)(answers, 0) == [2, -1, -2, 2]


def test_gsm8k_reads_a_worked_reference():
    assert GSM8K()([answered("#### 1,000", "500+500\n#### 1000")], 0) == [1.0]


def test_gsm8k_needs_a_reference():
    with pytest.raises(DataError, match="needs rows with a reference answer"):
        GSM8K()([answered("#### 1", None)], 0)


def test_gsm8k_reads_the_end_of_the_answer():
    early = "#### 42\n" + "x" * 300
    assert GSM8K()([answered(early), answered(early[:300])], 0) == [0.0, 1.0]
    assert GSM8K(window=400)([answered(early)], 0) == [1.0]


def test_gsm8k_agrees_with_all_recorded_verdicts(shared):
    solvers = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    answers, verdicts = [], []
    for line in (shared / "data" / "gsm8k" / "model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers += [answered(row[solver]["solution"], row["ground_truth"]) for solver in solvers]
        verdicts += [row[solver]["is_correct"] for solver in solvers]
    scores = GSM8K(marker="A:")(answers, 0)
    assert len(scores) == 600
    assert [score == 1.0 for score in scores] == verdicts


def test_length_by_hand():
    answers = [answered("", n_tokens=n) for n in (8, 4, 16)]
    assert Length(target=8)(answers, 0) == [0.0, -0.5, -1.0]
    assert Length(cap=8)(answers, 0) == [0.0, 0.0, -1.0]


def test_the_soft_overlong_punishment():
    """Yu et al., 2025, eq. 13, with longest 10 and buffer 4: 0 up to 6, then a quarter for each token."""
    answers = [answered("", n_tokens=n) for n in (1, 6, 7, 8, 10, 11, 99)]
    assert Length(longest=10, buffer=4)(answers, 0) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Length needs a target, a cap, or longest and buffer"),
        ({"longest": 4}, "longest and buffer of Length belong together"),
        ({"longest": 4, "buffer": 5}, "buffer=5 of Length must be at most longest=4"),
        ({"target": 0}, "target=0 of Length must be at least 1"),
    ],
)
def test_impossible_lengths_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Length(**settings)


GOOD = "<reasoning>3 + 4</reasoning>\n<answer>7</answer>"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (GOOD, 1.0),
        (f" {GOOD}\n", 1.0),
        (f"So: {GOOD}", 0.5),
        (GOOD.replace("</answer>", ""), 0.25),
        ("<answer>7</answer><reasoning>3 + 4</reasoning>", 0.25),
        ("<reasoning> </reasoning><answer>7</answer>", 0.25),
        (GOOD + "<answer>8</answer>", 0.25),
        ("7", 0.0),
    ],
)
def test_sections_in_tags(text, score):
    assert Format(partial=0.5)([answered(text)], 0) == [score]


def test_text_outside_of_sections_may_be_allowed():
    assert Format(is_strict=False)([answered(f"So: {GOOD} indeed")], 0) == [1.0]
    with pytest.raises(ConfigError, match=r"tags=\['a', 'a'\] of Format must be different names"):
        Format(tags=("a", "a"))


def test_repetition_by_hand():
    """Of the two-grams of `a b a b a`, ab ba ab ba, two of four are different."""
    assert Repetition(n=2)([answered("A b a B a"), answered("a b c"), answered("")], 0) == [-0.5, 0.0, 0.0]
    assert Repetition(n=1, unit="tokens")([answered("", answer_ids=(5, 5, 5, 6))], 0) == [-0.5]


def test_a_random_reward_is_a_function_of_step_and_rows():
    answers = [answered("x", row=row) for row in range(400)]
    reward = Random(probability=0.25, low=-1, high=3)
    first = reward(answers, 3)
    assert first == reward(answers, 3)
    assert first != reward(answers, 4) != Random(probability=0.25, low=-1, high=3, seed=1)(answers, 4)
    assert set(first) == {-1.0, 3.0}
    assert first.count(3.0) / 400 == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize(
    "text", ["#" * 10**6, "#### " + " " * 10**6, "#### " + "1" * 10**6, "<a>" * 300_000, "ab " * 300_000]
)
def test_a_megabyte_takes_no_time(text):
    started = time.perf_counter()
    found = [reward([answered(text)], 0) for reward in (GSM8K(window=10**7), Format(), Repetition())]
    assert found[0] == [0.0]
    assert time.perf_counter() - started < 2.0


@config
class Fixed(Reward):
    """What it is told to return."""

    scores: tuple
    on_error: OnError = "stop"

    def __call__(self, answers, step):
        if self.scores == ("raise",):
            raise KeyError("unit")
        return list(self.scores)


def three(*scores, **settings):
    return Rewards({"fixed": Fixed(scores=scores, **settings), "length": Length(target=8, weight=0.5)})


ANSWERS = [answered("a", n_tokens=8), answered("b", n_tokens=4), answered("c", n_tokens=16)]


def test_rewards_are_added_up_by_weight():
    scores = three(1, 0, 1, weight=2.0)(ANSWERS, 5)
    assert scores.total.dtype == np.float32  # also of integers: 0.5 stays 0.5
    np.testing.assert_array_equal(scores.total, [2.0, -0.25, 1.5])
    np.testing.assert_array_equal(scores.parts["length"], np.float32([0.0, -0.5, -1.0]))
    assert scores.is_valid.all()
    assert scores.metrics["rewards/fixed/mean"] == pytest.approx(2 / 3)
    assert scores.metrics["rewards/length/std"] == pytest.approx(np.std([0, -0.5, -1]))
    assert scores.metrics["rewards/fixed/errors"] == 0
    assert scores.metrics["reward/mean"] == pytest.approx(3.25 / 3)
    assert set(scores.times) == {"rewards/fixed/milliseconds", "rewards/length/milliseconds"}
    assert scores.seconds >= sum(scores.times.values()) / 1000 > 0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ((1.0, 2.0), "it gave 2 scores for 3 answers"),
        ((1.0, float("nan"), 0.0), "failed on row 7 'b': its score is nan"),
        ((1.0, 0.0, float("inf")), "failed on row 7 'c': its score is inf"),
        (("0.5", 1.0, 1.0), "its score is no number but str '0.5'"),
        ((None, 1.0, 1.0), "its score is no number but NoneType"),
        ((10**400, 1.0, 1.0), "its score is too large a number"),
        ((Failed("no unit"), Failed("no unit"), 1.0), r"\(and 1 more of 3\): no unit"),
        (("raise",), r"failed on 3 answers: KeyError: 'unit' \(test_rewards.py, line \d+\)"),
    ],
)
def test_a_reward_that_goes_wrong_is_named(scores, message):
    with pytest.raises(TrainingError, match=f"reward fixed .*{message}"):
        three(*scores)(ANSWERS, 0)
    masked = three(*scores, on_error="mask")(ANSWERS, 0)
    n_wrong = int(masked.metrics["rewards/fixed/errors"])
    assert n_wrong == (~masked.is_valid).sum() == np.isnan(masked.parts["fixed"]).sum() > 0
    np.testing.assert_array_equal(masked.total[~masked.is_valid], 0.0)
    judged = masked.parts["fixed"][masked.is_valid]
    if judged.size:
        assert masked.metrics["rewards/fixed/mean"] == judged.mean()
    else:
        assert "rewards/fixed/mean" not in masked.metrics


def test_masked_answers_are_told(caplog):
    three(1.0, float("nan"), Failed("no unit"), on_error="mask")(ANSWERS, 0)
    assert "reward fixed: 1 of 3 answers masked, such as row 7 'b': its score is nan" in caplog.text
    assert "row 7 'c': no unit" in caplog.text


def test_numbers_of_other_libraries_are_numbers():
    scores = three(np.float32(0.5), np.array(2), True)(ANSWERS, 0)
    np.testing.assert_array_equal(scores.parts["fixed"], [0.5, 2.0, 1.0])


def test_impossible_sums_are_refused():
    with pytest.raises(ConfigError, match=r"reward\.length\.weight=nan must be finite"):
        Rewards({"length": Length(target=1, weight=float("nan"))})
    with pytest.raises(ConfigError, match="choose at least one"):
        Rewards({})


def test_no_answers_have_no_scores():
    scores = Rewards({"length": Length(target=8)})([], 0)
    assert len(scores.total) == len(scores.is_valid) == 0
