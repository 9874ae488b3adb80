"""Finished runs as this experiment reads them: metrics.jsonl, log.txt and .hydra/overrides.yaml of a run's folder."""

import json
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
LAST = 5  # steps whose mean is a run's divergence: the last quarter of the sweep's


class Swept(NamedTuple):
    """A run of the frontier. divergence: KL(π ‖ π_ref) by k3, nats per token. reward, accuracy: of held-out answers,
    after the last step. low, high: of the accuracy's interval."""

    coefficient: float
    divergence: float
    reward: float
    accuracy: float
    low: float
    high: float


def metrics(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def evaluated(run: Path) -> list[Row]:
    """The rows with held-out answers: the first is from before the first step."""
    return [row for row in metrics(run) if "val/accuracy" in row]


def minutes(run: Path) -> float:
    """From the first line of the run's log to the last."""
    times = re.findall(r"^(\d\d):(\d\d):(\d\d) ", (run / "log.txt").read_text(encoding="utf-8"), re.MULTILINE)
    first, last = (int(h) * 3600 + int(m) * 60 + int(s) for h, m, s in (times[0], times[-1]))
    return (last - first) % 86_400 / 60


def swept(sweep: Path) -> list[Swept]:
    """The runs of a sweep over algorithm.kl.coef, the smallest coefficient first."""
    found = []
    for run in (path.parent for path in sweep.glob("*/metrics.jsonl")):
        overrides = (run / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
        coefficient = float(re.findall(r"algorithm\.kl\.coef=(\S+)", overrides)[-1])
        divergence = statistics.fmean([row["kl/k3"] for row in metrics(run) if "kl/k3" in row][-LAST:])
        last = evaluated(run)[-1]
        bounds = (last[f"val/accuracy{end}"] for end in ("", "_low", "_high"))
        found.append(Swept(coefficient, divergence, last["val/reward/mean"], *bounds))
    return sorted(found)
