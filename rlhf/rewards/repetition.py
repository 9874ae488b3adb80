"""A penalty for saying the same again."""

from collections.abc import Hashable, Sequence
from typing import Literal

from rlhf.config import config, require_range
from rlhf.rewards.base import Answered, Reward


@config
class Repetition(Reward):
    """-(1 - different n-grams / all n-grams): 0 where none comes twice, near -1 where one thing is said for ever.

    n: length of an n-gram. unit: `words` between white space, in lower case, or `tokens`.
    """

    n: int = 3
    unit: Literal["words", "tokens"] = "words"

    def __post_init__(self):
        require_range(self, "n", at_least=1)

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answered) -> float:
        units: Sequence[Hashable] = answer.answer_ids if self.unit == "tokens" else answer.completion.lower().split()
        grams = list(zip(*(units[start:] for start in range(self.n)), strict=False))
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
