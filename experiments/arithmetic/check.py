"""What finished runs on the embedded word problems gained: python experiments/arithmetic/check.py RUNS

RUNS holds a folder for each run, named algorithm-seed (`grpo-0`), with `metrics.jsonl` and, from `task=compare`,
`compare/comparison.json`. Exits with 1 if a run misses its bar, or an algorithm has fewer runs than it needs.
"""

import collections
import json
import statistics
import sys
from pathlib import Path
from typing import Any

LEAST_GAIN = {"grpo": 0.15, "ppo": 0.10}  # in accuracy, every seed; the others have to be better than chance explains
GAINS_NOTHING = ("random",)
LEAST_RUNS = {"grpo": 3, "random": 1, "rft": 1, "online_dpo": 1}


def meets_bar(algorithm: str, accuracy: dict[str, Any]) -> bool:
    """Whether the paired comparison of one run says what its algorithm is held to."""
    if algorithm in LEAST_GAIN:
        return accuracy["difference"] >= LEAST_GAIN[algorithm] and accuracy["verdict"] == "improved"
    is_better = accuracy["verdict"] == "improved"
    return not is_better if algorithm in GAINS_NOTHING else is_better


def seconds(folder: Path) -> float:
    """About the wall time of a run's steps, evaluation left out: the median of the logged ones times their number."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows[-1]["step"] * statistics.median(row["seconds"] for row in rows if "seconds" in row)


def main(runs: Path) -> int:
    print("| run | before | after | gain, points (95 % interval) | p | its steps, about s | bar |\n" + "|---" * 7 + "|")
    seen: collections.Counter[str] = collections.Counter()
    is_good = True
    for folder in sorted(path.parent.parent for path in runs.glob("*/compare/comparison.json")):
        algorithm = folder.name.rsplit("-", 1)[0]
        accuracy = json.loads((folder / "compare/comparison.json").read_text(encoding="utf-8"))["accuracy"]
        gain, low, high = (100 * accuracy[key] for key in ("difference", "difference_low", "difference_high"))
        is_met = meets_bar(algorithm, accuracy)
        print(
            f"| {folder.name} | {accuracy['baseline']:.3f} | {accuracy['candidate']:.3f} "
            f"| {gain:+.1f} ({low:+.1f} to {high:+.1f}) | {accuracy['p_value']:.2g} | {seconds(folder):.0f} "
            f"| {'met' if is_met else 'MISSED'} |"
        )
        seen[algorithm] += 1
        is_good &= is_met
    for name, least in LEAST_RUNS.items():
        if seen[name] < least:
            print(f"{name}: {seen[name]} finished comparisons in {runs}, {least} are needed")
            is_good = False
    return 0 if is_good else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: check.py RUNS")
    sys.exit(main(Path(sys.argv[1])))
