"""What a supervised token costs, as values."""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf.config import config


class TokenLoss:
    """The cost of each token, given its log-probability (nats)."""

    @abstractmethod
    def __call__(self, logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]: ...


@config
class NegativeLogLikelihood(TokenLoss):
    """-log p: maximum likelihood."""

    def __call__(self, logprobs):
        return -logprobs


@config
class Dynamic(TokenLoss):
    """-p log p with p held constant: dynamic fine-tuning (Wu et al., 2025); it undoes likelihood's weight 1 / p."""

    def __call__(self, logprobs):
        return -jax.lax.stop_gradient(jnp.exp(logprobs)) * logprobs
