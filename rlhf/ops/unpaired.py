"""Losses on single answers that are labelled desirable or undesirable."""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf.config import Number, config


class Unpaired:
    """A loss per answer."""

    @property
    def needs_kl(self) -> bool:
        """Whether the loss is measured from the policy's mean divergence, which costs two forward passes."""
        return False

    @abstractmethod
    def __call__(
        self,
        log_ratios: Float[Array, "batch"],
        kl: Float[Array, "batch"],
        is_desirable: Bool[Array, "batch"],
        beta: Number,
    ) -> Float[Array, "batch"]:
        """log_ratios: log π(y|x) − log π_ref(y|x) in nats; kl: the batch's estimate, the same in every row."""


@config
class KahnemanTversky(Unpaired):
    """KTO (Ethayarajh et al., 2024, section 4): gains and losses against the reference point kl (z_0 in the paper)."""

    @property
    def needs_kl(self):
        return True

    def __call__(self, log_ratios, kl, is_desirable, beta):
        gain = beta * (log_ratios - kl)
        return jax.nn.sigmoid(jnp.where(is_desirable, -gain, gain))


@config
class APOZeroUnpaired(Unpaired):
    """APO-zero on single answers (D'Oosterlinck et al., 2024, eq. 7): the reference point is 0."""

    def __call__(self, log_ratios, kl, is_desirable, beta):
        gain = beta * log_ratios
        return jax.nn.sigmoid(jnp.where(is_desirable, -gain, gain))
