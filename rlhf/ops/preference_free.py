"""Losses made for training without a reference. CPO needs none of its own: it is `Sigmoid` on log-probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf.config import Number, config, require_range
from rlhf.ops.preference import Preference, smoothed_logistic

_LARGEST_LOGPROB = -1e-6  # the odds of a certain answer are infinite; float32 resolves 1 - p to about this


def log1mexp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(1 − e^x) for x < 0, exact at both ends (Mächler, 2012, eq. 7); x above −1e-6 counts as −1e-6."""
    x = jnp.minimum(x, _LARGEST_LOGPROB)
    is_near_zero = x > -jnp.log(2.0)
    near_zero = jnp.log(-jnp.expm1(jnp.where(is_near_zero, x, -1.0)))  # the other branch's values must not reach
    far = jnp.log1p(-jnp.exp(jnp.where(is_near_zero, -1.0, x)))  # this one: their gradients would be 0 · inf
    return jnp.where(is_near_zero, near_zero, far)


def log_odds(logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(p / (1 − p)) of p = e^logprobs."""
    return logprobs - log1mexp(logprobs)


@config
class SimPO(Preference):
    """The sigmoid loss with a target margin (Meng et al., 2024, eq. 6); on `Alpha` pooling, AlphaPO.

    gamma: margin between the rewards from which on a pair counts as won, in units of reward (beta included).
    label_smoothing: assumed share of flipped labels, 0 to 0.5.
    """

    gamma: Number = 1.375
    label_smoothing: Number = 0.0

    def __post_init__(self):
        require_range(self, "gamma", at_least=0)
        require_range(self, "label_smoothing", at_least=0, at_most=0.5)

    def __call__(self, pairs, beta):
        return smoothed_logistic(beta * pairs.margins() - self.gamma, self.label_smoothing)


@config
class OddsRatio(Preference):
    """The odds-ratio term of ORPO (Hong et al., 2024, eq. 7), times beta (lambda in the paper).

    The odds are of the geometric mean of the token probabilities. The other term of ORPO is `sft_weight: 1`.
    """

    @property
    def uses_reference(self):
        return False

    @property
    def uses_divergence(self):
        return False

    @property
    def uses_pooling(self):
        return False

    def __call__(self, pairs, beta):
        odds = log_odds(pairs.mean_logprobs)
        return -beta * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1])
