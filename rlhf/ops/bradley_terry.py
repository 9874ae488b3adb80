"""The Bradley-Terry model of preferences, other losses of a reward model, and how far its probabilities can be trusted.

P(first is better) = sigmoid(score of the first − score of the second) (Bradley & Terry, 1952).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf.config import Number


def pair_losses(
    chosen: Float[Array, "pairs"],
    rejected: Float[Array, "pairs"],
    margin: Float[Array, "pairs"],
    centering: Number,
) -> Float[Array, "pairs"]:
    """−log P(chosen is better), each.

    margin: how far apart the scores should be at least (Touvron et al., 2023, eq. 2); 0 is the plain loss.
    centering: weight of (chosen + rejected)², which keeps scores around 0 (Eisenstein et al., 2023, eq. 2): the loss
        alone is blind to a shift of both.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2


def label_losses(score: Float[Array, "rows"], is_good: Bool[Array, "rows"]) -> Float[Array, "rows"]:
    """−log P(label) with P(good) = sigmoid(score), each: as if compared with an answer of score 0."""
    return -jax.nn.log_sigmoid(jnp.where(is_good, score, -score))


def score_losses(score: Float[Array, "rows"], wanted: Float[Array, "rows"]) -> Float[Array, "rows"]:
    """Squared error / 2, each: it has the slope of the other losses where it is off by one."""
    return (score - wanted) ** 2 / 2


class Calibration(NamedTuple):
    """How often the answer that a reward model prefers is the better one, by how sure it is.

    confidence, accuracy: mean of each bin, NaN in an empty one. error: expected calibration error, the mean over pairs
    of |accuracy − confidence| of their bin (Naeini et al., 2015, section 2).
    """

    edges: Float[np.ndarray, "edges"]
    n: Int[np.ndarray, "bins"]
    confidence: Float[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]
    error: float


def calibration(differences: Float[np.ndarray, "pairs"], n_bins: int = 10) -> Calibration:
    """Predicted against actual preference.

    differences: score of the better answer minus that of the worse one. The confidence of a pair is that of the side
    it prefers, sigmoid(|difference|), from 0.5 to 1; a tie is right by half.
    """
    confidence = 1 / (1 + np.exp(-np.abs(differences.astype(np.float64))))
    is_right = np.where(differences == 0, 0.5, differences > 0)
    edges = np.linspace(0.5, 1.0, n_bins + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, n_bins - 1)
    n = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(bins, weights=confidence, minlength=n_bins) / n
        actual = np.bincount(bins, weights=is_right, minlength=n_bins) / n
    error = float(np.nansum(n * np.abs(actual - predicted)) / max(len(differences), 1))
    return Calibration(edges, n, predicted, actual, error)
