"""Policy losses, as values: what a token of an answer costs, given how its probability moved since it was drawn.

Three choices make a loss: at which level the importance ratio is taken (`RatioLevel`), how it is kept near 1
(`PolicyLoss`), and how answers are weighed that another distribution than the trainer's wrote (`Correction`). All give
one number per token; which mean is taken over them is `rlhf.ops.weights`' business.
"""

import dataclasses
from abc import abstractmethod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError

LARGEST_LOG_RATIO = 20.0  # e^20 is 5e8: finite, and far beyond every clipping bound


class RatioLevel:
    """What one ratio covers."""

    @abstractmethod
    def __call__(
        self, log_ratio: Float[Array, "*batch time"], is_answer: Bool[Array, "*batch time"]
    ) -> Float[Array, "*batch time"]:
        """The ratio that counts for each token; log_ratio: log π(token) − log π_old(token), 0 outside the answer."""


def _ratio(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.exp(jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


@config
class TokenRatio(RatioLevel):
    """Each token's own (Schulman et al., 2017, section 3)."""

    def __call__(self, log_ratio, is_answer):
        return _ratio(log_ratio)


@config
class SequenceRatio(RatioLevel):
    """The geometric mean over an answer's tokens, for all of them (GSPO; Zheng et al., 2025, eq. 7)."""

    def __call__(self, log_ratio, is_answer):
        n_tokens = jnp.maximum(jnp.sum(is_answer, axis=-1, keepdims=True), 1)
        mean = jnp.sum(log_ratio * is_answer, axis=-1, keepdims=True) / n_tokens
        return jnp.broadcast_to(_ratio(mean), log_ratio.shape)


@config
class AnswerRatio(RatioLevel):
    """The product over an answer's tokens, for all of them: the answer is one action (RLOO; Ahmadian et al., 2024)."""

    def __call__(self, log_ratio, is_answer):
        total = jnp.sum(log_ratio * is_answer, axis=-1, keepdims=True)
        return jnp.broadcast_to(_ratio(total), log_ratio.shape)


@dataclasses.dataclass(frozen=True)
class PolicyTokens:
    """What policy losses may look at; everything is for each token, and counts only where `is_answer`.

    logprobs: of the policy that is trained; the only one with a gradient besides `ratio`.
    old_logprobs: of the policy when the batch was prepared, by the same function.
    sampler_logprobs: as the sampler reported them.
    ratio: at the chosen level, of `logprobs` to `old_logprobs`.
    advantages: how much better than expected.
    """

    logprobs: Float[Array, "*batch time"]
    old_logprobs: Float[Array, "*batch time"]
    sampler_logprobs: Float[Array, "*batch time"]
    ratio: Float[Array, "*batch time"]
    advantages: Float[Array, "*batch time"]
    is_answer: Bool[Array, "*batch time"]

    def answer_mean(self, values: Float[Array, "*batch time"]) -> Float[Array, "*batch 1"]:
        """Mean over each row's answer tokens; 0 for a row without any."""
        n_tokens = jnp.maximum(jnp.sum(self.is_answer, axis=-1, keepdims=True), 1)
        return jnp.sum(values * self.is_answer, axis=-1, keepdims=True) / n_tokens


class PolicyLoss:
    """A loss per token, to be minimised."""

    @abstractmethod
    def __call__(self, tokens: PolicyTokens) -> Float[Array, "*batch time"]: ...

    def clipped(self, tokens: PolicyTokens) -> tuple[Bool[Array, "*batch time"], Bool[Array, "*batch time"]]:
        """Which tokens the lower and the upper bound hold back."""
        never = jnp.zeros(tokens.ratio.shape, bool)
        return never, never


@config
class Unclipped(PolicyLoss):
    """−ratio · advantage: the policy gradient with importance weights and nothing else."""

    def __call__(self, tokens):
        return -tokens.ratio * tokens.advantages


@config
class Clipped(PolicyLoss):
    """−min(ratio · A, clip(ratio) · A) (PPO; Schulman et al., 2017, eq. 7).

    low, high: the ratio gains nothing below 1 − low or above 1 + high. With high > low unlikely tokens may grow
        (clip-higher; DAPO, Yu et al., 2025, eq. 10).
    """

    low: Number = 0.2
    high: Number = 0.2

    def __post_init__(self):
        require_range(self, "low", at_least=0, at_most=1)
        require_range(self, "high", at_least=0, may_be_infinite=True)

    def __call__(self, tokens):
        bounded = jnp.clip(tokens.ratio, 1 - self.low, 1 + self.high)
        return -jnp.minimum(tokens.ratio * tokens.advantages, bounded * tokens.advantages)

    def clipped(self, tokens):
        return (
            (tokens.ratio < 1 - self.low) & (tokens.advantages < 0),
            (tokens.ratio > 1 + self.high) & (tokens.advantages > 0),
        )


@config
class DualClipped(PolicyLoss):
    """`Clipped`, and for A < 0 never more than −largest · A (dual-clip PPO; Ye et al., 2020).

    largest: ratio beyond which a token that should become rarer costs no more; above 1 + high.
    """

    low: Number = 0.2
    high: Number = 0.2
    largest: Number = 3.0

    def __post_init__(self):
        require_range(self, "low", at_least=0, at_most=1)
        require_range(self, "high", at_least=0, may_be_infinite=True)
        require_range(self, "largest", above=1, may_be_infinite=True)
        numbers = isinstance(self.largest, float | int) and isinstance(self.high, float | int)
        if numbers and self.largest < 1 + self.high:
            raise ConfigError(f"largest={self.largest:g} of DualClipped must be at least 1 + high = {1 + self.high:g}")

    def __call__(self, tokens):
        bounded = jnp.clip(tokens.ratio, 1 - self.low, 1 + self.high)
        ratio = jnp.minimum(tokens.ratio, self.largest)
        return -jnp.minimum(ratio * tokens.advantages, bounded * tokens.advantages)

    def clipped(self, tokens):
        low, high = Clipped(low=self.low, high=self.high).clipped(tokens)
        return low, high | ((tokens.ratio > self.largest) & (tokens.advantages < 0))


@config
class ClippedWeight(PolicyLoss):
    """−sg(min(ratio, largest)) · A · log π: every token keeps its gradient (CISPO; MiniMax, 2025, eq. 4 and 5).

    largest: bound of the weight; 1 + ε_high in the paper, which has no lower bound.
    """

    largest: Number = 5.0

    def __post_init__(self):
        require_range(self, "largest", above=0, may_be_infinite=True)

    def __call__(self, tokens):
        weight = jax.lax.stop_gradient(jnp.minimum(tokens.ratio, self.largest))
        return -weight * tokens.advantages * tokens.logprobs

    def clipped(self, tokens):
        high = (tokens.ratio > self.largest) & (tokens.advantages > 0)
        return jnp.zeros_like(high), high


@config
class SoftGate(PolicyLoss):
    """−(4 / τ) σ(τ (ratio − 1)) · A: the gradient fades smoothly away from 1 (SAPO; Gao et al., 2025).

    positive, negative: τ where the advantage is above 0, and elsewhere; larger fades sooner.
    """

    positive: Number = 1.0
    negative: Number = 1.05

    def __post_init__(self):
        require_range(self, "positive", above=0)
        require_range(self, "negative", above=0)

    def __call__(self, tokens):
        tau = jnp.where(tokens.advantages > 0, self.positive, self.negative)
        return -jax.nn.sigmoid(tau * (tokens.ratio - 1)) * 4 / tau * tokens.advantages


@config
class GammaWeight(PolicyLoss):
    """−sg(w^k e^(λ (1 − w))) · A · log π with w the whole answer's ratio (VESPO; Shen et al., 2026).

    It takes the product over the answer whatever the ratio's level.

    positive_power, positive_rate: k and λ where the advantage is not below 0.
    negative_power, negative_rate: k and λ elsewhere.
    """

    positive_power: Number = 2.0
    positive_rate: Number = 3.0
    negative_power: Number = 3.0
    negative_rate: Number = 2.0

    def __post_init__(self):
        require_range(self, "positive_power", "positive_rate", "negative_power", "negative_rate", above=0)

    def __call__(self, tokens):
        log_ratio = (tokens.logprobs - tokens.old_logprobs) * tokens.is_answer
        total = jnp.clip(jnp.sum(log_ratio, axis=-1, keepdims=True), -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        is_good = tokens.advantages >= 0
        power = jnp.where(is_good, self.positive_power, self.negative_power)
        rate = jnp.where(is_good, self.positive_rate, self.negative_rate)
        weight = jax.lax.stop_gradient(jnp.exp(power * total + rate * (1 - jnp.exp(total))))
        return -weight * tokens.advantages * tokens.logprobs


class Correction:
    """How much each token's loss counts, because what sampled is not quite what is trained."""

    @abstractmethod
    def __call__(self, tokens: PolicyTokens) -> Float[Array, "*batch time"]:
        """Without a gradient."""


@config
class NoCorrection(Correction):
    """Everything counts."""

    def __call__(self, tokens):
        return jnp.ones_like(tokens.logprobs)


@config
class TruncatedImportance(Correction):
    """min(π_old / π_sampler, largest), as the trainer and the sampler compute them (Yao et al., 2025).

    For a sampler with narrower weights (`sampling.weights`), or whose answers come from a file.

    largest: bound of the weight.
    """

    largest: Number = 2.0

    def __post_init__(self):
        require_range(self, "largest", above=0, may_be_infinite=True)

    def __call__(self, tokens):
        log_ratio = (tokens.old_logprobs - tokens.sampler_logprobs) * tokens.is_answer
        return jax.lax.stop_gradient(jnp.minimum(_ratio(log_ratio), self.largest))


@config
class NegativeMask(Correction):
    """Answers with A < 0 that the policy has moved away from don't count (DeepSeek-AI, 2025,
    "DeepSeek-V3.2").

    threshold: mean log π_sampler − log π per token of an answer, nats, above which it is left out.
    """

    threshold: Number = 0.1

    def __post_init__(self):
        require_range(self, "threshold", at_least=0)

    def __call__(self, tokens):
        distance = tokens.answer_mean(tokens.sampler_logprobs - tokens.logprobs)
        is_kept = (tokens.advantages >= 0) | (distance <= self.threshold)
        return jax.lax.stop_gradient(is_kept.astype(jnp.float32))


def ratio_metrics(
    tokens: PolicyTokens, policy: PolicyLoss, weight: Float[Array, "*batch time"]
) -> dict[str, Float[Array, ""]]:
    """`policy/…`: how far the policy is from the one that made the batch.

    weight: `rlhf.ops.weights.PerToken` of the whole batch makes means over answer tokens.
    """

    def mean(values):
        return jnp.mean(jnp.sum(weight * values, axis=-1))

    low, high = policy.clipped(tokens)
    log_ratio = (tokens.logprobs - tokens.old_logprobs) * tokens.is_answer
    return {
        "policy/ratio": 1 + mean(tokens.ratio - 1),  # weights add up to 1 but for their rounding
        "policy/ratio/max": jnp.max(jnp.where(tokens.is_answer, tokens.ratio, 0.0)),
        "policy/approx_kl": mean(_ratio(log_ratio) - 1 - log_ratio),
        "policy/clipfrac_low": mean(low),
        "policy/clipfrac_high": mean(high),
        "policy/clipfrac": mean(low | high),
    }
