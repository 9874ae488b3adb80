"""The answer extractor on hand-written cases, on GSM8K's own answers and on 600 solutions with a recorded verdict."""

import json

import pytest

from rlhf.errors import DataError
from rlhf.rewards.answers import final_answer, has_format, is_correct, is_same_number, reference_answer

NUMBERS = {
    "#### 18": "18",
    "So 9 * 2 = $18.\n#### 18\n": "18",
    "####18": "18",
    "#### 1,080": "1080",
    "#### 109,200,000": "109200000",
    "#### -5": "-5",
    "#### +5": "5",
    "#### \u22125": "-5",
    "#### $18": "18",
    "#### -$1,080.50": "-1080.50",
    "#### $-3": "-3",
    "#### \\$7": "7",
    "#### €12": "12",
    "#### 18.": "18",
    "#### 18.0.": "18.0",
    "#### .5": "0.5",
    "#### 18 dollars a day.": "18",
    "#### 18km": "18",
    "#### 18%": "18",
    "#### **18**": "18",
    "#### 3/4": "3/4",
    "#### -3/4 cup": "-3/4",
    "#### 18 (that is, 2 each)": "18",
    "#### 18<|end|>": "18",
    "#### 5\nbut then\n#### 7": "7",
    "#### 7\nand 12 more": "7",
    "The answer is #### 7": "7",
}
NOT_NUMBERS = [
    "",
    "18",
    "####",
    "#### ",
    "#### eighteen",
    "#### x = 18",
    "#### \n18",
    "### 18",
    "#### 1,08",
    "#### 10,00,000",
    "#### 1.2.3",
    "#### 1e5",
    "#### 3 * 4",
    "#### 5-10",
    "#### 5 - 10 = -5",
    "#### 1 000",
    "#### 5:30",
    "#### 5/0",
    "#### 1/2/3",
    "#### --5",
    "#### -$-5",
    "#### 5\n#### none",
]


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_numbers_are_read(text, number):
    assert final_answer(text) == number
    assert has_format(text)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_other_things_are_no_answer(text):
    assert final_answer(text) is None
    assert not has_format(text)
    assert not is_correct(text, "18")


def test_numbers_are_compared_as_numbers():
    assert is_same_number("18.00", "18")
    assert is_same_number("3/4", "0.75")
    assert is_same_number("1.5/3", "0.5")
    assert is_same_number("-0", "0")
    assert not is_same_number("18", "-18")
    assert not is_same_number("0.3333333333333333", "1/3")
    assert not is_same_number("10000000000000000000000000000001", "10000000000000000000000000000000")
    assert is_same_number("9" * 6000, "9" * 6000 + ".0")  # longer than int() of a text may be


def test_a_marker_of_letters_is_a_word():
    assert final_answer("Made in USA: 5", "A:") is None
    assert final_answer("A: 3\nMade in USA: 5", "A:") == "3"
    assert final_answer("...\nA: 18", "A:") == "18"


def test_a_reference_may_be_a_solution_or_a_number():
    assert reference_answer("16 - 7 = 9\n#### 1,009") == "1009"
    assert reference_answer(" 1,009 ") == "1009"
    assert is_correct("#### 1009.0", "so\n#### 1,009")
    for text in ("#### Paris", "Paris", ""):
        with pytest.raises(DataError, match="holds no number"):
            reference_answer(text)


def rows_of(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_every_answer_of_gsm8k_is_read(shared):
    n_rows = 0
    for name in ("train", "test"):
        for row in rows_of(shared / "data" / "gsm8k" / f"{name}.jsonl"):
            solution = row["answer"]
            plain = solution.split("####")[1].strip().replace(",", "")
            assert final_answer(solution) == reference_answer(solution) == plain
            assert is_correct(solution, plain)
            n_rows += 1
    assert n_rows == 2400


def test_all_recorded_verdicts_agree(shared):
    solvers = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    verdicts = []
    for row in rows_of(shared / "data" / "gsm8k" / "model_solutions.jsonl"):
        for solver in solvers:
            verdict = is_correct(row[solver]["solution"], row["ground_truth"], marker="A:")
            assert verdict == row[solver]["is_correct"], row[solver]["solution"]
            verdicts.append(verdict)
    assert len(verdicts) == 600
    assert sum(verdicts) == 223
