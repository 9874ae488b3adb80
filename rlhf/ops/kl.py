"""Estimates of the Kullback-Leibler divergence from the reference, per token, from one sampled token each.

With x ~ π the log-ratio is d = log π(x) − log π_ref(x). Names and properties: Schulman, 2020, "Approximating KL
divergence".

| estimator | value | expectation | where it belongs |
|---|---|---|---|
| `K1` | d | KL(π ‖ π_ref), can be negative | in the reward: its policy gradient is the gradient of KL(π ‖ π_ref) |
| `K2` | d² / 2 | near KL where d is small | in the loss: its gradient is the gradient of KL(π ‖ π_ref) |
| `K3` | e^−d − 1 + d | KL(π ‖ π_ref), never negative | in the loss: its gradient is the gradient of KL(π_ref ‖ π) |

In the loss, K1 has a gradient of zero expectation; in the reward, K2 and K3 nearly vanish near the reference. The
gradients are worked out in Tang & Munos, 2025, "On a few pitfalls in KL divergence gradient estimation for RL".
"""

from abc import abstractmethod
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError

LARGEST_EXPONENT = 20.0  # of k3: e^20 is 5e8 nats; beyond it the estimate is flat instead of infinite


class KLEstimator:
    """One number per token, in nats."""

    @abstractmethod
    def __call__(self, log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """log_ratio: log π(token) − log π_ref(token)."""

    @property
    def has_gradient(self) -> bool:
        """Whether a loss term of it pulls the policy anywhere, in expectation."""
        return True


@config
class K1(KLEstimator):
    """d: unbiased, of large variance, negative for tokens that the policy finds less likely than the reference."""

    def __call__(self, log_ratio):
        return log_ratio

    @property
    def has_gradient(self):
        return False


@config
class K2(KLEstimator):
    """d² / 2: biased, of small variance."""

    def __call__(self, log_ratio):
        return log_ratio**2 / 2


@config
class K3(KLEstimator):
    """e^−d − 1 + d: unbiased and never negative; the KL term of GRPO (Shao et al., 2024, eq. 4)."""

    def __call__(self, log_ratio):
        return jnp.expm1(jnp.minimum(-log_ratio, LARGEST_EXPONENT)) + log_ratio


ESTIMATORS: Mapping[str, KLEstimator] = {"k1": K1(), "k2": K2(), "k3": K3()}  # all of them, for the log


def kl_metrics(
    log_ratio: Float[Array, "*batch time"], weight: Float[Array, "*batch time"]
) -> dict[str, Float[Array, ""]]:
    """`kl/k1`, `kl/k2`, `kl/k3`: mean over rows of the weighted sum over tokens of each estimate.

    weight: `rlhf.ops.weights.PerToken` of the whole batch makes it the mean over answer tokens, nats per token.
    """
    return {f"kl/{name}": jnp.mean(jnp.sum(weight * k(log_ratio), axis=-1)) for name, k in ESTIMATORS.items()}


class KLPenalty:
    """Where the divergence from the reference enters, and how much it counts (`coef`)."""

    @property
    def is_used(self) -> bool:
        """Whether there is any: without, no reference is loaded."""
        return False


@config
class NoKL(KLPenalty):
    """None: the policy is held to nothing, and no reference is in memory."""


@config
class InLoss(KLPenalty):
    """coef × the estimate is added to each token's loss.

    coef: 0 loads no reference.
    estimator: K2 for the gradient of KL(π ‖ π_ref), K3 for that of KL(π_ref ‖ π), which is GRPO's.
    importance_weighted: multiply by the ratio to the policy that sampled, whose gradient then flows too: with K1 and K3
        the gradient is that of KL(π ‖ π_ref), on- and off-policy (DeepSeek-AI, 2025, DeepSeek-V3.2, section 3.1).
    """

    coef: Number = 0.04
    estimator: KLEstimator = K3()
    importance_weighted: bool = False

    def __post_init__(self):
        require_range(self, "coef", at_least=0)
        if not self.estimator.has_gradient and not self.importance_weighted:
            raise ConfigError(
                "kl.estimator=K1 in the loss has a gradient of zero expectation, which holds the policy to nothing: "
                "use K2 or K3, kl.importance_weighted=true, or rlhf.ops.kl.InReward"
            )

    @property
    def is_used(self):
        return float(self.coef) != 0


@config
class InReward(KLPenalty):
    """coef × K1 is taken off the reward: the policy gradient of it is the gradient of KL(π ‖ π_ref).

    coef: 0 loads no reference.
    per_token: each token answers for the divergence of itself and those after it (REINFORCE++; Hu, 2025); false:
        the answer's sum is taken off its reward before advantages are made of it (RLOO; Ahmadian et al., 2024, eq. 2).
    """

    coef: Number = 0.05
    per_token: bool = False

    def __post_init__(self):
        require_range(self, "coef", at_least=0)

    @property
    def is_used(self):
        return float(self.coef) != 0
