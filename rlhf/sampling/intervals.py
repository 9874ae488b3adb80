"""How sure a measured number is, and whether two of them differ: plain Python and numpy on shares and scores."""

import math
from collections.abc import Callable, Sequence

import numpy as np

_Z = 1.959964  # two-sided 95 % of the normal distribution
_RESAMPLES = 10_000


def interval(successes: float, n: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927): where the true share may lie; (0, 1) when nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, _Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return 0.0 if successes == 0 else low, 1.0 if successes == n else high  # the formula's own ends, without rounding


def interval_of_shares(shares: Sequence[float], n_each: int) -> tuple[float, float]:
    """95 % interval of the mean of shares, one for each prompt, that come from `n_each` answers to it.

    Answers to one prompt are alike, so they count as fewer: Wilson's interval with the number of independent answers
    that would have the variance seen between prompts (Kish, 1965), from one to `n_each` for each prompt.
    """
    n, mean = len(shares), float(np.mean(shares)) if len(shares) else 0.0
    if n < 2 or n_each == 1:
        return interval(mean * n, n)
    variance = float(np.var(shares, ddof=1)) / n
    effective = mean * (1 - mean) / variance if variance > 0 else n
    effective = min(max(effective, n), n * n_each)
    return interval(mean * effective, effective)


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """Probability that one of k answers is right, without bias, from n answers (Chen et al., 2021, eq. 1)."""
    return 1.0 - math.comb(n - n_correct, k) / math.comb(n, k)


def majority_share(
    answers: Sequence[str | None], is_right: Sequence[bool], is_same: Callable[[str, str], bool]
) -> float:
    """Whether the most frequent answer is right; of equally frequent ones the share that is. None is no answer."""
    groups: list[tuple[str, int, bool]] = []
    for answer, right in zip(answers, is_right, strict=True):
        if answer is None:
            continue
        place = next((i for i, (first, _, _) in enumerate(groups) if is_same(answer, first)), None)
        if place is None:
            groups.append((answer, 1, right))
        else:
            first, count, was_right = groups[place]
            groups[place] = (first, count + 1, was_right)
    most = max((count for _, count, _ in groups), default=0)
    tied = [right for _, count, right in groups if count == most]
    return sum(tied) / len(tied) if tied else 0.0


def mcnemar(n_gained: int, n_lost: int) -> float:
    """Two-sided exact p-value of McNemar's test (1947): rows that only the second, or only the first, has right."""
    n = n_gained + n_lost
    tail = sum(math.comb(n, i) for i in range(min(n_gained, n_lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def interval_of_paired_difference(n_both: int, n_lost: int, n_gained: int, n_neither: int) -> tuple[float, float]:
    """95 % interval of a change between two shares of the same rows (Newcombe, 1998, method 10).

    n_both, n_lost, n_gained, n_neither: rows that both have right, only the first, only the second, none.
    """
    n = n_both + n_lost + n_gained + n_neither
    if n == 0:
        return -1.0, 1.0
    first, second = (n_both + n_lost) / n, (n_both + n_gained) / n
    (low_1, high_1), (low_2, high_2) = interval(first * n, n), interval(second * n, n)
    product = n_both * n_neither - n_lost * n_gained
    corrected = max(product - n / 2, 0.0) if product > 0 else product
    rows = (n_both + n_lost) * (n_gained + n_neither) * (n_both + n_gained) * (n_lost + n_neither)
    phi = corrected / math.sqrt(rows) if rows else 0.0
    down, up = second - low_2, high_2 - second
    other_up, other_down = high_1 - first, first - low_1
    below = math.sqrt(max(down**2 - 2 * phi * down * other_up + other_up**2, 0.0))
    above = math.sqrt(max(up**2 - 2 * phi * up * other_down + other_down**2, 0.0))
    return second - first - below, second - first + above


def sign_flips(values: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of a mean of paired differences: how often it would be as far from 0 if each had either sign
    with equal chance (Fisher, 1935); exact for up to 13 rows, else from 10,000 draws."""
    numbers = np.asarray([value for value in values if value], np.float64)
    n = len(numbers)
    if n == 0:
        return 1.0
    if n <= 13:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        sums = signs @ numbers
        return float(np.mean(np.abs(sums) >= abs(numbers.sum()) * (1 - 1e-12)))
    rng = np.random.default_rng(seed)
    sums = np.array([(numbers * rng.choice((-1.0, 1.0), n)).sum() for _ in range(_RESAMPLES)])
    as_far = np.sum(np.abs(sums) >= abs(numbers.sum()) * (1 - 1e-12))
    return float((as_far + 1) / (_RESAMPLES + 1))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean by resampling its rows (Efron, 1979, percentiles of 10,000 means)."""
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return -math.inf, math.inf
    rng = np.random.default_rng(seed)
    rows_at_once = max(1, 2_000_000 // len(numbers))
    means: list[float] = []
    while len(means) < _RESAMPLES:
        size = min(rows_at_once, _RESAMPLES - len(means))
        means.extend(numbers[rng.integers(0, len(numbers), (size, len(numbers)))].mean(axis=1))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
