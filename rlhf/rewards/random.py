"""A reward that knows nothing: the control that shows whether a gain comes from the reward."""

import zlib
from collections.abc import Sequence

import numpy as np

from rlhf.config import config, require_range
from rlhf.errors import ConfigError
from rlhf.rewards.base import Answered, Reward


@config
class Random(Reward):
    """`high` with a probability, else `low`, whatever the answer; the same again for the same step and rows.

    probability: of `high`. seed: of the draws.
    """

    probability: float = 0.5
    low: float = 0.0
    high: float = 1.0
    seed: int = 0

    def __post_init__(self):
        require_range(self, "probability", at_least=0, at_most=1)
        require_range(self, "seed", at_least=0)
        if self.low > self.high:
            raise ConfigError(f"low={self.low} of Random must be at most high={self.high}")

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        rows = zlib.crc32(np.array([answer.row for answer in answers], np.int64).tobytes())
        draws = np.random.default_rng([self.seed, step, rows]).random(len(answers))
        return np.where(draws < self.probability, self.high, self.low).tolist()
