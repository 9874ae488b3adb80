"""Two sets of answers to the same prompts, row by row: which is better, and whether that is more than chance."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.errors import DataError
from rlhf.sampling.intervals import bootstrap, interval, interval_of_paired_difference, mcnemar, sign_flips

Row = Mapping[str, Any]
Verdict = str  # "improved", "worse", or "no difference shown"

_SURE = 0.05


def verdict(low: float, high: float, p_value: float, even: float = 0.0) -> Verdict:
    """What a 95 % interval and a test's p-value say of a change: nothing unless both are clear of chance."""
    if low <= even <= high or p_value >= _SURE:
        return "no difference shown"
    return "improved" if low > even else "worse"


def pairs_by_prompt(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[list[Row], list[Row]]]:
    """The rows of each prompt in both, in the first's order.

    Raises:
        DataError: they are not answers to the same prompts.
    """
    grouped: tuple[dict[int, list[Row]], dict[int, list[Row]]] = ({}, {})
    for rows, groups in zip((first, second), grouped, strict=True):
        for row in rows:
            groups.setdefault(row["row"], []).append(row)
    if grouped[0].keys() != grouped[1].keys():
        n_common = len(grouped[0].keys() & grouped[1].keys())
        raise DataError(
            f"the two have answers to different prompts: {len(grouped[0])} and {len(grouped[1])}, {n_common} in common"
        )
    for number, rows in grouped[0].items():
        if rows[0]["prompt"] != grouped[1][number][0]["prompt"]:
            raise DataError(f"row {number} is another prompt in each: they were made from different data or templates")
    return [(rows, grouped[1][number]) for number, rows in grouped[0].items()]


def compare_means(pairs: Sequence[tuple[Sequence[Row], Sequence[Row]]], key: str) -> dict[str, Any]:
    """A number of each answer, in both: means, the difference (second - first) with its 95 % interval over prompts, and
    a p-value, and the verdict. Prompts where one of them has no such number are left out, and counted in `n_left_out`.

    For truth values of one answer to each prompt: `gained` and `lost`, prompts that only the second, or the first, has
    right, McNemar's exact p-value and Newcombe's interval. Else the p-value is of random signs, the interval of the
    bootstrap.
    """
    known = [(a, b) for a, b in pairs if all(row.get(key) is not None for row in (*a, *b))]
    if not known:
        return {}
    means = [(statistics.fmean(row[key] for row in a), statistics.fmean(row[key] for row in b)) for a, b in known]
    differences = [after - before for before, after in means]
    found: dict[str, Any] = {
        "baseline": statistics.fmean(before for before, _ in means),
        "candidate": statistics.fmean(after for _, after in means),
        "difference": statistics.fmean(differences),
    }
    if all(len(a) == len(b) == 1 and isinstance(a[0][key], bool) for a, b in known):
        n_both, gained, lost = means.count((1.0, 1.0)), differences.count(1.0), differences.count(-1.0)
        low, high = interval_of_paired_difference(n_both, lost, gained, len(known) - n_both - lost - gained)
        found |= {"gained": gained, "lost": lost}
        p_value = mcnemar(gained, lost)
    else:
        low, high = bootstrap(differences)
        p_value = sign_flips(differences)
    return {
        **found,
        "difference_low": low,
        "difference_high": high,
        "p_value": p_value,
        "n": len(known),
        "n_left_out": len(pairs) - len(known),
        "verdict": verdict(low, high, p_value),
    }


def win_rate(wins: Sequence[float]) -> dict[str, Any]:
    """Share of prompts on which the second is better; a tie is half. wins: 1, 0.5 or 0 (or a share) for each prompt;
    NaN where it is not known."""
    known = [win for win in wins if not math.isnan(win)]
    if not known:
        return {}
    low, high = interval(sum(known), len(known))
    p_value = sign_flips([win - 0.5 for win in known])
    return {
        "win_rate": statistics.fmean(known),
        "win_rate_low": low,
        "win_rate_high": high,
        "win_rate_p_value": p_value,
        "win_rate_verdict": verdict(low, high, p_value, even=0.5),
    }
