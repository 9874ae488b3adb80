"""The rewards in the package, and what a wrong one gets told."""

import pytest

from rlhf.config import config
from rlhf.errors import DataError
from rlhf.rewards.base import Answered, Reward
from rlhf.rewards.gsm8k import GSM8K
from rlhf.rewards.length import Length
from rlhf.sampling.evaluate import _score


def answered(text, reference="42", n_tokens=8):
    return Answered("?", text, reference, {}, n_tokens, False)


def test_gsm8k_pays_for_the_number_and_a_little_for_the_form():
    answers = [answered(t) for t in ("6*7=42\n#### 42", "#### 41", "it is 42", "#### 1\n#### 42.0")]
    assert GSM8K()(answers, 0) == [1.0, 0.1, 0.0, 1.0]
    assert GSM8K(correct=2, format=-1, wrong=-2)(answers, 0) == [2, -1, -2, 2]


def test_gsm8k_reads_a_worked_reference():
    assert GSM8K()([answered("#### 1,000", "500+500\n#### 1000")], 0) == [1.0]


def test_gsm8k_needs_a_reference():
    with pytest.raises(DataError, match="needs rows with a reference answer"):
        GSM8K()([answered("#### 1", None)], 0)


def test_length_by_hand():
    assert Length(target=8)([answered("", n_tokens=n) for n in (8, 4, 16)], 0) == [0.0, -0.5, -1.0]


@config
class Fixed(Reward):
    scores: tuple[float, ...]

    def __call__(self, answers, step):
        return list(self.scores)


class Asked:
    token_ids, answer, fields, row, soft_tokens, pictures = (1,), "42", {}, 7, (), ()


ROW = {"row": 7, "prompt": "?", "completion": "#### 42", "n_tokens": 3, "is_truncated": False}


def test_scores_go_into_rows_and_summary():
    rows = [dict(ROW), dict(ROW)]
    summary = _score(rows, [Asked(), Asked()], Fixed(scores=(0.25, 0.75)))
    assert summary == {"rewards/fixed/mean": 0.5, "rewards/fixed/std": 0.25}
    assert [row["rewards/fixed"] for row in rows] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("scores", "message"),
    [((1.0, 2.0), "gave 2 scores for 1 answers"), ((float("nan"),), "gave nan for row 7")],
)
def test_a_reward_that_goes_wrong_is_named(scores, message):
    with pytest.raises(DataError, match=message):
        _score([dict(ROW)], [Asked()], Fixed(scores=scores))
