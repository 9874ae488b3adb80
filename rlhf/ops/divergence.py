"""Which divergence keeps the policy near its reference: f-DPO (Wang et al., 2024).

Under a divergence f the implicit reward of an answer is beta · f'(π(y|x) / π_ref(y|x)) plus a constant (theorem 1).
Each class here maps the log-ratio to f', with the constant chosen so that an unchanged policy scores 0: it cancels in a
difference of scores, but not where scores are divided by a length or used one by one.
"""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf.config import Number, config, require_range
from rlhf.ops.pooling import bounded_power


class Divergence:
    """Score of an answer: f'(ratio) − f'(1), from the logarithm of the ratio."""

    @abstractmethod
    def __call__(self, log_ratios: Float[Array, "pairs 2"]) -> Float[Array, "pairs 2"]: ...


@config
class ReverseKL(Divergence):
    """f' = log u: the score is the log-ratio, as in DPO."""

    def __call__(self, log_ratios):
        return log_ratios


@config
class ForwardKL(Divergence):
    """f' = −1/u (table 1): covers the reference's modes, and punishes losing any of them."""

    def __call__(self, log_ratios):
        return bounded_power(log_ratios, 1.0)


@config
class JensenShannon(Divergence):
    """f' = log(2u / (1 + u)) (table 1): bounded above, so it can't push an answer up without end."""

    def __call__(self, log_ratios):
        return jax.nn.log_sigmoid(log_ratios) + jnp.log(2.0)


@config
class AlphaDivergence(Divergence):
    """f' = (1 − u^(−α)) / α (table 1): from reverse KL (α → 0) to forward KL (α = 1).

    alpha: above 0, at most 1.
    """

    alpha: Number = 0.5

    def __post_init__(self):
        require_range(self, "alpha", above=0, at_most=1)

    def __call__(self, log_ratios):
        return bounded_power(log_ratios, self.alpha)
