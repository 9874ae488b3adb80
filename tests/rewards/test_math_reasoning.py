"""Answers in tags: what is the same answer, what reasoning looks like, and MathVista's rows."""

import json
import time

import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.rewards.base import Answered
from rlhf.rewards.extract import Tagged, Whole
from rlhf.rewards.math_reasoning import MathReasoning
from rlhf.rewards.same_answer import is_same, overlap

CHOICES = {"choices": ["12", "15", "18", "21"]}
FLOAT = {"answer_type": "float", "precision": 1.0}
SAME = [
    ("B", "15", CHOICES),
    ("(b)", "15", CHOICES),
    ("B) 15", "15", CHOICES),
    ("**B**", "15", CHOICES),
    ("option C", "18", CHOICES),
    ("The answer is D", "21", CHOICES),
    ("15.0", "15", CHOICES),
    ("D", "D)", {"choices": ["A)", "B)", "C)", "D)"]}),
    ("145", "145°", {"choices": ["135°", "140°", "145°"]}),
    ("B", "15", {"choices": json.dumps(CHOICES["choices"])}),
    ("−5", "-5", {}),
    ("5 cm", "5", {}),
    ("5cm", "5 centimeters", {}),
    ("$1,080", "1080", {}),
    ("1080 dollars", "$1080", {}),
    ("90 degrees", "90°", {}),
    ("3.1416", "3.14159", {}),
    ("\\frac{1}{2}", "0.5", {}),
    ("$21 \\mathrm{~cm}$", "21 cm", {}),
    ("Yes.", "yes", {}),
    ("47.63", "47.6", FLOAT),
    ("0, 2, 8", "[0, 2, 8]", {}),
]
DIFFERENT = [
    ("B) 18", "15", CHOICES),
    ("A", "15", CHOICES),
    ("E", "21", CHOICES),
    ("quarter to", "quarter", {"choices": ["half", "quarter", "quarter to"]}),
    ("-5", "5", {}),
    ("5 km", "5 cm", {}),
    ("1001", "1000", {}),
    ("3.2", "3.1416", {}),
    ("47.66", "47.6", FLOAT),
    ("[0, 2]", "[0, 2, 8]", {}),
    ("[0, 8, 2]", "[0, 2, 8]", {}),
    ("18 apples and 3 pears", "18", {}),
    ("x = 5", "5", {}),
    ("", "", {}),
]


@pytest.mark.parametrize(("found", "expected", "fields"), SAME)
def test_the_same_answer(found, expected, fields):
    assert is_same(found, expected, fields, 0.001)


@pytest.mark.parametrize(("found", "expected", "fields"), DIFFERENT)
def test_another_answer(found, expected, fields):
    assert not is_same(found, expected, fields, 0.001)


def test_words_in_common_by_hand():
    """Two of three and two of two words: F1 is 4 / 5."""
    assert overlap("the red fox", "Red fox.") == pytest.approx(0.8)
    assert overlap("dog", "cat") == 0.0


def answered(text, reference: str | None = "14", **fields):
    return Answered("?", text, reference, fields, 3, False, row=2)


WORKED = "<reasoning>First 3 + 4 = 7, then 7 * 2 = 14. So it is 14 apples in all.</reasoning>\n<answer>14</answer>"


def test_the_three_parts_are_weighted():
    reward = MathReasoning(format_weight=1, answer_weight=10, reasoning_weight=100)
    assert reward([answered(WORKED)], 0) == [111.0]
    assert reward([answered(WORKED.replace("<answer>14", "<answer>-14"))], 0) == [101.0]
    assert reward([answered("<answer>14</answer>")], 0) == [10.5]
    assert reward([answered("14")], 0) == [0.0]


def test_the_quality_of_reasoning_by_hand():
    """Five of ten words, one of two steps, no notation; by weights 1, 2 and 5."""
    reward = MathReasoning(least_words=10, steps=2, length_weight=1, steps_weight=2, notation_weight=5)
    assert reward.quality("so there are seven apples") == pytest.approx((0.5 + 2 * 0.5) / 8)
    assert MathReasoning(least_words=1, most_words=4).quality("a b c d e f g h") == pytest.approx(0.5 / 3)


def test_words_may_earn_a_part():
    reward = MathReasoning(format_weight=0, reasoning_weight=0, overlap=0.5)
    assert reward([answered("<answer>the red fox</answer>", "red fox")], 0) == [pytest.approx(0.4)]
    assert reward([answered("<answer>red</answer>", "red fox", choices=["red fox", "dog"])], 0) == [0.0]


def test_rows_of_mathvista(shared):
    """Every answer is itself, and of choices just one letter and one text is right."""
    n_choices = 0
    for name in ("mathvista_annotations/testmini_noimage", "mathvista_form/testmini"):
        for line in (shared / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert is_same(row["answer"], row["answer"], row, 0.001)
            if row["choices"]:
                letters = [is_same("ABCDEFGH"[n], row["answer"], row, 0.001) for n in range(len(row["choices"]))]
                texts = [is_same(one, row["answer"], row, 0.001) for one in row["choices"]]
                assert letters == texts
                assert sum(letters) == 1
                n_choices += 1
    assert n_choices == 61


@pytest.mark.parametrize("text", ["<answer>" + "1," * 500_000 + "</answer>", "<answer>" * 100_000, "so " * 300_000])
def test_a_megabyte_takes_no_time(text):
    started = time.perf_counter()
    MathReasoning()([answered(f"<reasoning>{text}</reasoning>{text}")], 0)
    assert time.perf_counter() - started < 1.0


def test_extractors_for_evaluation():
    assert Tagged().extract("<answer> a </answer> <answer>12 km</answer>", {}) == "12 km"
    assert Tagged(tag="final").extract("<answer>12</answer>", {}) is None
    assert Tagged().is_same("12", "12 km", {})
    assert Whole().extract(" red \n", {}) == "red"
    with pytest.raises(DataError, match="the reference answer is empty"):
        Tagged().expected(" ", {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_tag": "reasoning"}, "must be different names"),
        ({"answer_tag": "a b"}, "must be different names without <, > or /"),
        ({"tolerance": -1}, "tolerance=-1 of MathReasoning must be at least 0"),
        ({"most_words": 5}, "most_words=5 of MathReasoning must be at least 10"),
        ({"length_weight": 0, "steps_weight": 0, "notation_weight": 0}, "must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MathReasoning(**settings)


def test_a_reference_is_needed():
    with pytest.raises(DataError, match="row 2 has none"):
        MathReasoning()([answered("1", None)], 0)
