"""How much each pair counts in the mean of a preference loss. Weights are constants: no gradient flows through them."""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf.config import config
from rlhf.ops.pooling import Mean


class PairWeighting:
    """Weight of each pair."""

    @property
    def needs_collision(self) -> bool:
        """Whether `log_collision`, a statistic of the whole next-token distribution, is looked at."""
        return False

    @abstractmethod
    def __call__(
        self,
        logprobs: Float[Array, "pairs 2 time"],
        log_collision: Float[Array, "pairs 2 time"],
        is_answer: Bool[Array, "pairs 2 time"],
    ) -> Float[Array, "pairs"]:
        """log_collision: log Σ p² of the distribution that predicted each token; zeros unless `needs_collision`."""


@config
class Unweighted(PairWeighting):
    """Every pair counts 1."""

    def __call__(self, logprobs, log_collision, is_answer):
        return jnp.ones(logprobs.shape[0])


@config
class WPO(PairWeighting):
    """Pairs count as much as the policy would have written them (Zhou et al., 2024, eq. 2).

    aligned: measure each token against the mean probability of a token sampled there (their sampled alignment), so
        that a pair drawn from the policy itself weighs about 1. False: the plain geometric mean probability.
    """

    aligned: bool = True

    @property
    def needs_collision(self):
        return self.aligned

    def __call__(self, logprobs, log_collision, is_answer):
        relative = logprobs - log_collision if self.aligned else logprobs
        return jax.lax.stop_gradient(jnp.exp(jnp.sum(Mean()(relative, is_answer), axis=-1)))
