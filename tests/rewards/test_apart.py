"""Code that is not ours, as rewards: whatever it does, the step goes on or stops with a named error, in time."""

import sys
import time

import numpy as np
import pytest

from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.rewards.base import Answered
from rlhf.rewards.math_verify import MathVerify
from rlhf.rewards.python import Python
from rlhf.rewards.regex import Regex
from rlhf.rewards.weighted import Rewards

MODULE = """
import os, sys, time

def good(prompts, completions, fields, step):
    print("to the terminal")
    assert len(prompts) == len(completions) == len(fields)
    return [len(c) + f["bonus"] + step for c, f in zip(completions, fields)]

def modules(prompts, completions, fields, step):
    return [float("jax" in sys.modules)] * len(completions)

def number(prompts, completions, fields, step):
    return [float(os.getpid())] * len(completions)

def loop(prompts, completions, fields, step):
    while "loop" in completions:
        pass
    return [1.0] * len(completions)

def crash(prompts, completions, fields, step):
    os._exit(3)

def leave(prompts, completions, fields, step):
    sys.exit("bye")

def divide(prompts, completions, fields, step):
    return [1 / len(c) for c in completions]

def nan(prompts, completions, fields, step):
    return [1.0, float("nan"), 0.0]

def short(prompts, completions, fields, step):
    return [1.0]

def nothing(prompts, completions, fields, step):
    pass

def of_another_library(prompts, completions, **columns):
    return [1.0] * len(completions)

def texts(prompts, completions, fields, step):
    return ["good"] * len(completions)

def image(prompts, completions, fields, step):
    return [float(len(f["image"])) for f in fields]
"""
LIMIT = 1.0


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module beside the command."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def answered(*texts, reference: str | None = None, **fields):
    return [Answered("?", text, reference, {"bonus": 0, **fields}, 3, False, row=row) for row, text in enumerate(texts)]


def connected(name, **settings):
    reward = Python(function=f"mine.{name}", **{"timeout_seconds": LIMIT, **settings})
    return Rewards({"python": reward}).connected(lambda checkpoint: None)


def test_a_function_gets_texts_rows_and_step(mine, capfd):
    scores = connected("good")(answered("", "ab", "abc", bonus=0.5), 10)
    np.testing.assert_array_equal(scores.total, [10.5, 12.5, 13.5])
    assert "to the terminal" in capfd.readouterr().err


def test_a_worker_stays_and_has_no_jax(mine):
    rewards = connected("number")
    assert rewards(answered("a"), 0).total == rewards(answered("a"), 1).total
    assert Python(function="mine.modules")(answered("a"), 0) == [0.0]


FAULTS = {
    "loop": "it took longer than 1 s",
    "crash": r"its process ended \(exit status 3\)",
    "leave": r"SystemExit: bye \(mine.py, line \d+\)",
    "divide": r"ZeroDivisionError: division by zero \(mine.py, line \d+\)",
    "nan": "its score is nan",
    "short": "it returned 1 scores for 3 answers",
    "nothing": "it returned NoneType, not a list of 3 numbers",
    "texts": "its score is no number but str 'good'",
}


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_goes_wrong_is_named_counted_and_in_time(mine, name, caplog):
    answers = answered("loop", "", "c")
    rewards = connected(name, on_error="mask")
    started = time.monotonic()
    scores = rewards(answers, 0)
    assert time.monotonic() - started < LIMIT + 1
    n_wrong = 1 if name == "nan" else 3
    assert scores.metrics["rewards/python/errors"] == n_wrong
    assert scores.is_valid.sum() == 3 - n_wrong
    with pytest.raises(TrainingError, match=f"reward python failed on row [01] '.*{FAULTS[name]}"):
        connected(name, timeout_seconds=1.0)(answers, 0)
    assert caplog.text.count("answers masked") == 1
    again = rewards(answered("a", "b", "c"), 1)  # another worker is there
    assert again.is_valid.all() == (name in ("loop", "divide"))


def test_one_answer_a_call_keeps_the_others(mine):
    rewards = connected("loop", on_error="mask", answers_per_call=1, call_seconds=0.3, workers=2)
    scores = rewards(answered("a", "loop", "b", "c"), 0)
    assert scores.is_valid.tolist() == [True, False, True, True]


def test_what_is_not_reached_in_time_has_failed(mine):
    rewards = connected("loop", on_error="mask", answers_per_call=1, timeout_seconds=0.5)
    scores = rewards(answered("a", "loop", "b"), 0)
    assert scores.is_valid.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mine.missing", "there is no function 'missing' in the module mine"),
        ("missing_module.f", "ModuleNotFoundError: No module named 'missing_module'"),
        ("f", "'f' is no import path of a function"),
        (
            "mine.of_another_library",
            r"called as of_another_library\(prompts, completions, fields, step\), and",
        ),
    ],
)
def test_a_function_that_is_not_there_is_told_before_the_first_step(mine, function, message):
    with pytest.raises(ConfigError, match=f"reward.python.function={function}: .*{message}"):
        Rewards({"python": Python(function=function)}).connected(lambda checkpoint: None)


class Drawing:
    """As a row of the package has its images."""

    def read(self):
        return b"12345"


Drawing.__module__ = "rlhf.data.colours"


def test_images_of_a_row_arrive_as_files(mine):
    assert Python(function="mine.image")(answered("a", image=Drawing()), 0) == [5.0]


def test_a_pattern_that_takes_for_ever_masks_its_answer():
    rewards = Rewards({"regex": Regex(pattern=r"(a+)+b", is_whole=True, call_seconds=0.5)})
    rewards = rewards.connected(lambda checkpoint: None)
    started = time.monotonic()
    scores = rewards(answered("aab", "a" * 40, "x" * 10**6, "aaab"), 0)
    assert time.monotonic() - started < 1.5
    assert scores.is_valid.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(scores.total, [1.0, 0.0, 0.0, 1.0])


def test_a_pattern_is_checked_at_once():
    assert Regex(pattern="b+", match=2, no_match=-1)(answered("abba", "x"), 0) == [2.0, -1.0]
    with pytest.raises(ConfigError, match=r"pattern='\(' of Regex is no regular expression"):
        Regex(pattern="(")


def test_math_verify_compares_expressions():
    """A bomb masks itself and nothing else."""
    cases = [
        ("so $\\frac{2}{4}$", "1/2", 1.0),
        ("$x \\in \\{1, 2\\}$", "\\{2, 1\\}", 1.0),
        ("it is -3", "3", 0.0),
        ("1,080 dollars", "1080", 1.0),
        ("I do not know", "3", -1.0),
        ("$9^{9^{9^{9^9}}}$", "3", None),
    ]
    reward = Rewards({"math_verify": MathVerify(unreadable=-1)}).connected(lambda checkpoint: None)
    answers = [Answered("?", text, reference, {}, 3, False) for text, reference, _ in cases]
    started = time.monotonic()
    scores = reward(answers, 0)
    assert time.monotonic() - started < 6
    for found, is_valid, (text, _, expected) in zip(scores.parts["math_verify"], scores.is_valid, cases, strict=True):
        assert is_valid == (expected is not None), text
        assert expected is None or found == expected, text
    with pytest.raises(DataError, match="needs reference answers; row 0 has none"):
        reward(answered("1"), 0)
