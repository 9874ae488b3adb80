"""Losses on pairs, as values: what a pair's two answers cost, given how far the policy moved from its reference.

A loss maps `Pairs` and beta to one number per pair; taking the mean is the algorithm's business. Here are the losses
that look at the margin between the two answers, and mixtures. `preference_absolute` judges each answer by itself,
`preference_sorted` compares across pairs, `preference_free` is for training without a reference.
"""

import dataclasses
from abc import abstractmethod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What losses on pairs may look at; index 0 of the second axis is the chosen answer, 1 the rejected one.

    policy, reference: pooled log-probability of each answer (`rlhf.ops.pooling`); 0 where there is no reference.
    scores: the divergence's score of policy against reference (the log-ratio, under reverse KL).
    mean_logprobs: the policy's log-probability per token, however the answers are pooled.
    n_tokens: answer tokens, at least 1.
    reward_shift: running mean of the rewards of earlier batches (BCO's delta), or 0.
    """

    policy: Float[Array, "pairs 2"]
    reference: Float[Array, "pairs 2"]
    scores: Float[Array, "pairs 2"]
    mean_logprobs: Float[Array, "pairs 2"]
    n_tokens: Float[Array, "pairs 2"]
    reward_shift: Float[Array, "pairs"]

    @property
    def log_ratios(self) -> Float[Array, "pairs 2"]:
        return self.policy - self.reference

    def margins(self, per_token: bool = False) -> Float[Array, "pairs"]:
        """Score of the chosen answer minus score of the rejected one, each divided by its length if `per_token`."""
        scores = self.scores / self.n_tokens if per_token else self.scores
        return scores[:, 0] - scores[:, 1]


class Preference:
    """A loss on pairs."""

    @property
    def needs_whole_batch(self) -> bool:
        """Whether pairs are compared with each other, so that a batch can't be cut into microbatches."""
        return False

    @property
    def needs_reward_shift(self) -> bool:
        """Whether `Pairs.reward_shift` is used; it costs a forward pass of the policy per batch."""
        return False

    @property
    def uses_reference(self) -> bool:
        return True

    @property
    def uses_divergence(self) -> bool:
        """Whether the loss sees `Pairs.scores`; if not, only reverse KL makes sense with it."""
        return True

    @property
    def uses_pooling(self) -> bool:
        """Whether the loss sees how answers are pooled."""
        return True

    @property
    def divides_by_length(self) -> bool:
        """Whether the loss divides scores by the lengths of answers."""
        return False

    @abstractmethod
    def __call__(self, pairs: Pairs, beta: Number) -> Float[Array, "pairs"]: ...

    def parts(self, pairs: Pairs, beta: Number) -> dict[str, Float[Array, "pairs"]]:
        """The unweighted losses that a mixture consists of, by name; empty for a single loss."""
        return {}


def smoothed_logistic(logits: Float[Array, "pairs"], label_smoothing: Number) -> Float[Array, "pairs"]:
    """Cross-entropy of the preference when a share `label_smoothing` of the labels is taken to be flipped."""
    right, flipped = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    return (1 - label_smoothing) * right + label_smoothing * flipped


@config
class Margin(Preference):
    """A loss of the margin alone.

    per_token: divide each answer's score by its number of tokens first.
    """

    per_token: bool = False

    @property
    def divides_by_length(self):
        return self.per_token

    def __call__(self, pairs, beta):
        return self.of_margin(pairs.margins(self.per_token), beta)

    @abstractmethod
    def of_margin(self, margin: Float[Array, "pairs"], beta: Number) -> Float[Array, "pairs"]: ...


@config
class Sigmoid(Margin):
    """The DPO loss (Rafailov et al., 2023, eq. 7); with label_smoothing, conservative DPO (Mitchell, 2023).

    label_smoothing: assumed share of flipped labels, 0 to 0.5.
    """

    label_smoothing: Number = 0.0

    def __post_init__(self):
        require_range(self, "label_smoothing", at_least=0, at_most=0.5)

    def of_margin(self, margin, beta):
        return smoothed_logistic(beta * margin, self.label_smoothing)


@config
class Robust(Margin):
    """Robust DPO: an unbiased estimate of the loss on clean labels (Chowdhury et al., 2024, section 3.1).

    label_smoothing: share of flipped labels, 0 to 0.49; the variance grows without bound towards one half.
    """

    label_smoothing: Number = 0.1

    def __post_init__(self):
        require_range(self, "label_smoothing", at_least=0, at_most=0.49)

    def of_margin(self, margin, beta):
        right, flipped = -jax.nn.log_sigmoid(beta * margin), -jax.nn.log_sigmoid(-beta * margin)
        return ((1 - self.label_smoothing) * right - self.label_smoothing * flipped) / (1 - 2 * self.label_smoothing)


@config
class Hinge(Margin):
    """SLiC's hinge on the log-ratio margin (Zhao et al., 2023, section 2; as a log-ratio Liu et al., 2024)."""

    def of_margin(self, margin, beta):
        return jax.nn.relu(1 - beta * margin)


@config
class IPO(Margin):
    """The IPO loss (Azar et al., 2023, eq. 17): pull the margin to 1 / (2 beta), not to infinity.

    per_token: the mean form, which its authors used; the sum form makes the square grow with the length.
    """

    per_token: bool = True

    def of_margin(self, margin, beta):
        return (margin - 1 / (2 * beta)) ** 2


@config
class EXO(Margin):
    """EXO for pairs (Ji et al., 2024, eq. 16): reverse KL from the policy's preference to the smoothed label.

    label_smoothing: probability that the label gives the rejected answer; above 0, or the KL is infinite.
    """

    label_smoothing: Number = 1e-3

    def __post_init__(self):
        require_range(self, "label_smoothing", above=0, at_most=0.5)

    def of_margin(self, margin, beta):
        logits = beta * margin
        chosen = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log1p(-self.label_smoothing))
        rejected = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - jnp.log(self.label_smoothing))
        return chosen + rejected


@config
class DiscoPOP(Margin):
    """DiscoPOP: logistic and exponential loss, mixed by the margin itself (Lu et al., 2024, eq. 5).

    temperature: of the mixing; tau in the paper.
    """

    temperature: Number = 0.05

    def __post_init__(self):
        require_range(self, "temperature", above=0)

    def of_margin(self, margin, beta):
        logits = beta * margin
        logistic = jax.nn.sigmoid(-logits / self.temperature) * -jax.nn.log_sigmoid(logits)
        # one exponential: at very negative logits exp(-logits) alone overflows and times 0 is NaN
        exponential = jnp.exp(jax.nn.log_sigmoid(logits / self.temperature) - logits)
        return logistic + exponential


@config
class Mixture(Preference):
    """A weighted sum of losses (MPO's preference and quality terms; Wang et al., 2024, section 3.2).

    losses: the losses; a metric `loss/<name>` shows each.
    weights: one for each.
    """

    losses: tuple[Preference, ...]
    weights: tuple[Number, ...]

    def __post_init__(self):
        if not self.losses or len(self.losses) != len(self.weights):
            raise ConfigError(
                f"losses has {len(self.losses)} entries and weights {len(self.weights)}: "
                "a mixture needs at least one loss and a weight for each"
            )

    @property
    def needs_whole_batch(self):
        return any(loss.needs_whole_batch for loss in self.losses)

    @property
    def needs_reward_shift(self):
        return any(loss.needs_reward_shift for loss in self.losses)

    @property
    def uses_reference(self):
        return any(loss.uses_reference for loss in self.losses)

    @property
    def uses_divergence(self):
        return all(loss.uses_divergence for loss in self.losses)

    @property
    def uses_pooling(self):
        return any(loss.uses_pooling for loss in self.losses)

    @property
    def divides_by_length(self):
        return any(loss.divides_by_length for loss in self.losses)

    def __call__(self, pairs, beta):
        values = self.parts(pairs, beta).values()
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def parts(self, pairs, beta):
        named: dict[str, Array] = {}
        for loss in self.losses:
            name = type(loss).__name__.lower()
            n_same = sum(other.split(".")[0] == name for other in named)
            named[f"{name}.{n_same + 1}" if n_same else name] = loss(pairs, beta)
        return named
