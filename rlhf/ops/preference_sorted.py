"""Losses that align distributions over the batch: sorted values are compared, not the two answers of a pair (AOT)."""

import jax.numpy as jnp

from rlhf.config import Number, config, require_range
from rlhf.ops.preference import Preference, smoothed_logistic


@config
class _Sorted(Preference):
    """label_smoothing: assumed share of flipped comparisons, 0 to 0.5."""

    label_smoothing: Number = 0.0

    def __post_init__(self):
        require_range(self, "label_smoothing", at_least=0, at_most=0.5)

    @property
    def needs_whole_batch(self):
        return True


@config
class AOT(_Sorted):
    """Alignment via optimal transport, paired (Melnyk et al., 2024, section 3).

    Each quantile of the policy's chosen-against-rejected log-ratio should lie above the reference's.
    """

    @property
    def uses_divergence(self):
        return False

    def __call__(self, pairs, beta):
        policy = jnp.sort(pairs.policy[:, 0] - pairs.policy[:, 1])
        reference = jnp.sort(pairs.reference[:, 0] - pairs.reference[:, 1])
        return smoothed_logistic(beta * (policy - reference), self.label_smoothing)


@config
class AOTUnpaired(_Sorted):
    """Alignment via optimal transport, unpaired (Melnyk et al., 2024, section 3).

    Each quantile of the chosen answers' scores should lie above the rejected answers'.
    """

    def __call__(self, pairs, beta):
        margin = jnp.sort(pairs.scores[:, 0]) - jnp.sort(pairs.scores[:, 1])
        return smoothed_logistic(beta * margin, self.label_smoothing)
