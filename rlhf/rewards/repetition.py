"""A penalty for saying the same again."""

from collections.abc import Hashable, Sequence
from typing import Literal

from rlhf.config import config, require_range
from rlhf.rewards.base import Answered, Reward

_WINDOW = 20_000  # characters, or tokens, at the end of an answer that are looked at


@config
class Repetition(Reward):
    """-(1 - different n-grams / all n-grams): 0 where none comes twice, near -1 where one thing is said for ever.

    n: length of an n-gram. unit: `words` between white space, in lower case, or `tokens`. Only the last 20,000
    characters, or tokens, of an answer count.
    """

    n: int = 3
    unit: Literal["words", "tokens"] = "words"

    def __post_init__(self):
        require_range(self, "n", at_least=1)

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answered) -> float:
        said = answer.answer_ids if self.unit == "tokens" else answer.completion
        last = said[-_WINDOW:]
        units: Sequence[Hashable] = last.lower().split() if isinstance(last, str) else last
        grams = list(zip(*(units[start:] for start in range(self.n)), strict=False))
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
