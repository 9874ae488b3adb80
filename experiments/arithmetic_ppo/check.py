"""Read the finished runs, print what they reached, and exit with 1 where a bar is missed: python check.py FOLDER

FOLDER holds rule_0, rule_1 …, reward_model (of task=evaluate), on_model_0 …, without_hold and frontier, as README.md
makes them; one that is absent is said to be, and is a miss.
"""

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from runs import Row, evaluated, minutes, swept

LEAST_GAIN, MOST_MINUTES, N_SEEDS = 0.10, 6.0, 3
START = (0.30, 0.60)  # accuracy of the SFT checkpoint that PPO starts from
LEAST_RANKED = 0.90
N_COEFFICIENTS = 5
SCORE = "val/rewards/reward_model/mean"


def shown(row: Row) -> str:
    return f"{row['val/accuracy']:.3f} ({row['val/accuracy_low']:.3f} to {row['val/accuracy_high']:.3f})"


def rule(folder: Path) -> bool:
    """PPO on the rule reward: every seed gains enough, in time."""
    runs = sorted(folder.glob("rule_*"))
    held = len(runs) >= N_SEEDS
    for run in runs:
        first, *_, last = evaluated(run)
        gain, taken = last["val/accuracy"] - first["val/accuracy"], minutes(run)
        held &= gain >= LEAST_GAIN and START[0] <= first["val/accuracy"] <= START[1] and taken <= MOST_MINUTES
        print(f"  {run.name}: {shown(first)} → {shown(last)}, {100 * gain:+.1f} points, {taken:.1f} minutes")
    print(f"  {len(runs)} of {N_SEEDS} seeds")
    return held


def reward_model(folder: Path) -> bool:
    """The reward model ranks enough of the held-out pairs right."""
    result = json.loads((folder / "reward_model" / "evaluation.json").read_text(encoding="utf-8"))
    name = "rewards/accuracies"
    low, high = (result[f"{name}_{end}"] for end in ("low", "high"))
    print(f"  {result[name]:.3f} ({low:.3f} to {high:.3f}) of {result['n_pairs']} pairs ranked right")
    for fault, found in result["accuracy_by_group"].items():
        print(f"    {fault}: {found}")
    return result[name] >= LEAST_RANKED


def on_model(folder: Path) -> bool:
    """PPO on the reward model raises its score and does not lower the accuracy by more than the interval."""
    runs = sorted(folder.glob("on_model_*"))
    held = len(runs) >= N_SEEDS
    for run in runs:
        first, *_, last = evaluated(run)
        held &= last[SCORE] > first[SCORE] and last["val/accuracy"] >= first["val/accuracy_low"]
        print(f"  {run.name}: score {first[SCORE]:.3f} → {last[SCORE]:.3f}, accuracy {shown(first)} → {shown(last)}")
    print(f"  {len(runs)} of {N_SEEDS} seeds")
    return held


def without_hold(folder: Path) -> bool:
    """With next to no KL term the score rises while the accuracy falls below its interval."""
    rows = evaluated(folder / "without_hold")
    for row in rows:
        print(f"  step {row['step']:3d}: score {row[SCORE]:.3f}, accuracy {shown(row)}")
    return rows[-1][SCORE] > rows[0][SCORE] and rows[-1]["val/accuracy"] < rows[0]["val/accuracy_low"]


def frontier(folder: Path) -> bool:
    """The divergence falls with every larger coefficient, the reward with every second: the largest two hardly move."""
    found = swept(folder / "frontier")
    for one in found:
        print(
            f"  coefficient {one.coefficient:g}: KL {one.divergence:.4f} nats per token, reward {one.reward:.3f}, "
            f"accuracy {one.accuracy:.3f} ({one.low:.3f} to {one.high:.3f})"
        )
    falls = all(a.divergence > b.divergence for a, b in pairwise(found))
    falls &= all(a.reward > b.reward for a, b in pairwise(found[::2]))
    return falls and len(found) >= N_COEFFICIENTS


CHECKS: tuple[Callable[[Path], bool], ...] = (rule, reward_model, on_model, without_hold, frontier)


def main() -> None:
    folder, held = Path(sys.argv[1]), True
    for check in CHECKS:
        print(check.__doc__)
        try:
            is_met = check(folder)
        except FileNotFoundError as error:
            print(f"  absent: {error.filename}")
            is_met = False
        print("  held" if is_met else "  MISSED")
        held &= is_met
    sys.exit(not held)


if __name__ == "__main__":
    main()
