"""From the log-probabilities of an answer's tokens to one number per answer.

A pair's two answers are pooled together, because one rule looks at both lengths. Tokens outside the answer never count.
"""

from abc import abstractmethod

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError


def count_tokens(is_answer: Bool[Array, "pairs 2 time"]) -> Float[Array, "pairs 2"]:
    """Answer tokens of each answer; 1 where there is none, so that it can divide."""
    return jnp.maximum(jnp.sum(is_answer, axis=-1), 1).astype(jnp.float32)


class Pooling:
    """One number per answer, in nats (`Alpha` excepted)."""

    @abstractmethod
    def __call__(
        self, logprobs: Float[Array, "pairs 2 time"], is_answer: Bool[Array, "pairs 2 time"]
    ) -> Float[Array, "pairs 2"]: ...


@config
class Sum(Pooling):
    """log π(y|x): the log-probability of the whole answer."""

    def __call__(self, logprobs, is_answer):
        return jnp.sum(logprobs * is_answer, axis=-1)


@config
class Mean(Pooling):
    """log π(y|x) / |y|: the log-probability per token (the reward of SimPO; Meng et al., 2024)."""

    def __call__(self, logprobs, is_answer):
        return jnp.sum(logprobs * is_answer, axis=-1) / count_tokens(is_answer)


@config
class LengthDesensitized(Pooling):
    """Tokens beyond the shorter answer's length count `alpha` (LD-DPO; Liu et al., 2024).

    alpha: 1 is the plain sum; 0 cuts both answers of a pair to the same length.
    """

    alpha: Number = 0.5

    def __post_init__(self):
        require_range(self, "alpha", at_least=0, at_most=1)

    def __call__(self, logprobs, is_answer):
        rank = jnp.cumsum(is_answer, axis=-1)  # 1 at the first answer token
        n_shared = jnp.min(rank[..., -1:], axis=-2, keepdims=True)
        weight = jnp.where(rank <= n_shared, 1.0, self.alpha) * is_answer
        return jnp.sum(weight * logprobs, axis=-1)


@config
class Alpha(Pooling):
    """(1 − π(y|x)^(−α/|y|)) / α: the reward shape of AlphaPO (Gupta et al., 2025, section 3); α → 0 is `Mean`.

    alpha: above 0 punishes improbable answers more than the logarithm does; below 0, less. Not 0.
    """

    alpha: Number = 0.25

    def __post_init__(self):
        if isinstance(self.alpha, float | int) and self.alpha == 0:
            raise ConfigError("pooling.alpha=0 of Alpha is a division by zero; its limit is rlhf.ops.pooling.Mean")

    def __call__(self, logprobs, is_answer):
        return bounded_power(Mean()(logprobs, is_answer), self.alpha)


LARGEST_EXPONENT = 40.0  # e^40 squared still fits into float32; beyond it a score is flat


def bounded_power(log_ratio: Float[Array, "*shape"], alpha: Number) -> Float[Array, "*shape"]:
    """(1 − e^(−α·log_ratio)) / α, exact near 0 and finite everywhere."""
    return -jnp.expm1(jnp.minimum(-alpha * log_ratio, LARGEST_EXPONENT)) / alpha
