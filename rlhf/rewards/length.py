"""Rewards for how long an answer is, in tokens."""

from collections.abc import Sequence

from rlhf.config import config, require_range
from rlhf.errors import ConfigError
from rlhf.rewards.base import Answered, Reward


@config
class Length(Reward):
    """The sum of what is set of these, of n tokens, the stop token included:

    target: -|n - target| / target: 0 at the target, -1 for an empty answer.
    cap: -1 for more than so many.
    longest, buffer: the soft overlong punishment (Yu et al., 2025, eq. 13): 0 up to longest - buffer, falling to -1 at
        longest, -1 beyond. buffer is part of longest.
    """

    target: int | None = None
    cap: int | None = None
    longest: int | None = None
    buffer: int | None = None

    def __post_init__(self):
        require_range(self, "target", "cap", "longest", "buffer", at_least=1)
        if (self.longest is None) != (self.buffer is None):
            raise ConfigError("longest and buffer of Length belong together: set both or neither")
        if self.target is self.cap is self.longest is None:
            raise ConfigError("Length needs a target, a cap, or longest and buffer, in tokens")
        if self.longest is not None and self.buffer is not None and self.buffer > self.longest:
            raise ConfigError(f"buffer={self.buffer} of Length must be at most longest={self.longest}")

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        return [self._score(answer.n_tokens) for answer in answers]

    def _score(self, n: int) -> float:
        score = 0.0
        if self.target is not None:
            score -= abs(n - self.target) / self.target
        if self.cap is not None and n > self.cap:
            score -= 1.0
        if self.longest is not None and self.buffer is not None:
            score += min(max((self.longest - self.buffer - n) / self.buffer, -1.0), 0.0)
        return score
