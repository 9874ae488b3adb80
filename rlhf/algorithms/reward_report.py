"""What single means can't say of a reward model: how sure its accuracy is, for which pairs it holds, whether its
probabilities are true, and whether it only likes long answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf.ops.bradley_terry import calibration
from rlhf.sampling.intervals import interval

_BINS = 20


def pair_report(rows: Sequence[Mapping[str, float]], groups: Sequence[str] | None, scale: float) -> dict[str, Any]:
    """For the result of an evaluation; nothing where no row is a pair.

    rows: the metrics of each held-out row as if it were alone; those that are no pair have a confidence of 0.
    groups: what each row is counted under, if anything.
    scale: of the head: margins divided by it are log-odds.
    """
    is_pair = np.array([row["rewards/confidence"] > 0 for row in rows])
    if not is_pair.any():
        return {}
    share = is_pair.mean()  # each row's numbers are weighted so that a mean over all rows is one over pairs
    margins = np.array([row["rewards/margins"] for row in rows])[is_pair] * share
    longer = np.array([row["rewards/length_difference"] for row in rows])[is_pair] * share
    is_right = np.where(margins == 0, 0.5, margins > 0)
    low, high = interval(float(is_right.sum()), len(is_right))
    report = {
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "n_pairs": len(is_right),
        "margins": _histogram(margins),
        "calibration": _calibration(margins / scale),
        "accuracy_by_length": _by_length(is_right, longer),
        "length_correlation": _correlation(margins, longer),
    }
    if groups is not None:
        named = np.array(groups)[is_pair]
        report["accuracy_by_group"] = {name: _accuracy(is_right[named == name]) for name in sorted(set(named.tolist()))}
    return report


def _accuracy(is_right: Float[np.ndarray, "pairs"]) -> dict[str, float]:
    n = len(is_right)
    low, high = interval(float(is_right.sum()), n)
    return {"n": n, "accuracy": float(is_right.mean()) if n else math.nan, "low": low, "high": high}


def _histogram(margins: Float[np.ndarray, "pairs"]) -> dict[str, list[float]]:
    counts, edges = np.histogram(margins, bins=_BINS)
    return {"edges": [round(float(edge), 6) for edge in edges], "n": counts.tolist()}


def _calibration(log_odds: Float[np.ndarray, "pairs"]) -> dict[str, Any]:
    found = calibration(log_odds)
    bins = [
        {"from": float(start), "to": float(end), "n": int(n), "confidence": float(confidence), "accuracy": float(right)}
        for start, end, n, confidence, right in zip(
            found.edges, found.edges[1:], found.n, found.confidence, found.accuracy, strict=False
        )
        if n
    ]
    return {"expected_calibration_error": found.error, "bins": bins}


def _by_length(is_right: Float[np.ndarray, "pairs"], longer: Float[np.ndarray, "pairs"]) -> dict[str, Any]:
    """Accuracy by how many tokens more the better answer has."""
    parts = {
        "better_is_longer": longer > 0.5,
        "as_long": np.abs(longer) <= 0.5,
        "better_is_shorter": longer < -0.5,
    }
    return {name: _accuracy(is_right[some]) for name, some in parts.items() if some.any()}


def _correlation(margins: Float[np.ndarray, "pairs"], longer: Float[np.ndarray, "pairs"]) -> float:
    """Pearson's r of margin and length difference: near 1 for a model that only likes long answers; 0 where either is
    the same for all pairs."""
    if margins.std() == 0 or longer.std() == 0:
        return 0.0
    return float(np.corrcoef(margins, longer)[0, 1])
