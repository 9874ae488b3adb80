"""Losses on pairs that judge each answer against the reference by itself, not only against the other answer."""

from jax.nn import log_sigmoid, sigmoid

from rlhf.config import config
from rlhf.ops.preference import Preference


@config
class NCA(Preference):
    """Noise-contrastive alignment for pairs (Chen et al., 2024, section 4.1): keeps the chosen answer likely."""

    def __call__(self, pairs, beta):
        chosen, rejected = beta * pairs.scores[:, 0], beta * pairs.scores[:, 1]
        return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


@config
class BCO(Preference):
    """Binary classifier optimization (Jung et al., 2024, section 4): is the reward above or below the mean reward?

    shifted: compare with the running mean of the rewards of all earlier batches (delta in the paper; 0 in the first
        batch). False compares with 0 and saves the forward pass that finds a batch's mean reward.
    """

    shifted: bool = True

    @property
    def needs_reward_shift(self):
        return self.shifted

    def __call__(self, pairs, beta):
        chosen, rejected = (beta * pairs.scores[:, side] - pairs.reward_shift for side in (0, 1))
        return -log_sigmoid(chosen) - log_sigmoid(-rejected)


@config
class SPPO(Preference):
    """Self-play preference optimization (Wu et al., 2024, eq. 4.7 with certain labels; eta = 1 / beta)."""

    def __call__(self, pairs, beta):
        target = 1 / (2 * beta)
        return (pairs.scores[:, 0] - target) ** 2 + (pairs.scores[:, 1] + target) ** 2


@config
class APOZero(Preference):
    """Anchored preference optimization, zero (D'Oosterlinck et al., 2024, eq. 7): chosen up, rejected down.

    For chosen answers that are better than what the model writes by itself.
    """

    def __call__(self, pairs, beta):
        return sigmoid(-beta * pairs.scores[:, 0]) + sigmoid(beta * pairs.scores[:, 1])


@config
class APODown(Preference):
    """Anchored preference optimization, down (D'Oosterlinck et al., 2024, eq. 8): chosen down, rejected further down.

    For chosen answers that are worse than what the model writes by itself.
    """

    def __call__(self, pairs, beta):
        return sigmoid(beta * pairs.scores[:, 0]) + sigmoid(-beta * pairs.margins())
