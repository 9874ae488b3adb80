"""A reward for answers of a given length: for trying things out."""

from collections.abc import Sequence

from rlhf.config import config, require_range
from rlhf.rewards.base import Answered, Reward


@config
class Length(Reward):
    """-|tokens - target| / target: 0 at the target length, -1 for an empty answer.

    target: tokens, the stop token included.
    """

    target: int

    def __post_init__(self):
        require_range(self, "target", at_least=1)

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        return [-abs(answer.n_tokens - self.target) / self.target for answer in answers]
