"""Which mean a loss takes over its tokens, as a weight per token.

The trainer averages a loss over rows and over microbatches. With the weights here, made once from the whole batch,
`mean over rows of the weighted sum over tokens` is the mean that the paper asks for, however the batch is cut:
one microbatch of 16 rows and sixteen of one row give the same gradient.
"""

from abc import abstractmethod

import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf.config import config


class Weighting:
    """Weight of each token, in a batch of rows; zero where `is_counted` is false."""

    @abstractmethod
    def __call__(
        self, is_counted: Bool[np.ndarray | Array, "batch time"]
    ) -> Float[np.ndarray | Array, "batch time"]: ...


@config
class PerToken(Weighting):
    """Every counted token of the batch weighs the same: sum over tokens / number of tokens."""

    def __call__(self, is_counted):
        return is_counted * (is_counted.shape[0] / is_counted.sum().clip(1))


@config
class PerSequence(Weighting):
    """Every row weighs the same: mean over its tokens, then mean over rows (a row without tokens weighs nothing)."""

    def __call__(self, is_counted):
        return is_counted / is_counted.sum(axis=-1, keepdims=True).clip(1)


@config
class PerConstant(Weighting):
    """Sum over tokens divided by a constant, whatever the lengths (Dr. GRPO; Liu et al., 2025)."""

    length: int

    def __call__(self, is_counted):
        return is_counted / self.length
