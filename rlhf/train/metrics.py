"""The numbers of a run: `metrics.jsonl`, TensorBoard events, `samples.jsonl`, the log line and the progress bar.

All files go on exactly after the step of a checkpoint: later rows are cut, so none is missing or doubled. Of several
processes of one run, the first writes.
"""

import datetime
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import processes
from rlhf.train.rows import RowFile, as_number, read_rows
from rlhf.train.tensorboard import EventFile

log = logging.getLogger(__name__)


def _number(value: Any) -> int | float:
    """A Python number from anything that holds one; float32 becomes the float with the same value."""
    value = np.asarray(value).item()
    return int(value) if isinstance(value, bool | int) else float(value)


class _Nothing:
    """In place of a file, in processes that write none."""

    def append(self, *row: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def _row_file(path: Path, after_step: int) -> RowFile | _Nothing:
    return RowFile(path, after_step) if processes.is_first() else _Nothing()


class MetricsWriter:
    """One row per logged step: `step`, the metrics, then the time columns; the same to TensorBoard.

    folder: the run's folder. resume_step: the last step to keep; None or 0 starts anew.
    """

    def __init__(self, folder: Path, resume_step: int | None = None):
        self._rows = _row_file(Path(folder) / "metrics.jsonl", resume_step or 0)
        self._events = EventFile(Path(folder), resume_step or 0) if processes.is_first() else _Nothing()
        self._last = resume_step or -1

    def write(self, step: int, metrics: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        """Append the row of a step; steps ascend.

        Raises:
            ValueError: a step comes twice or out of order, or a name is used twice.
        """
        if step <= self._last:
            raise ValueError(f"metrics of step {step} after those of step {self._last}: a row would be doubled")
        if twice := ({"step"} & {*metrics, *times}) | (metrics.keys() & times.keys()):
            raise ValueError(f"two columns of metrics are called {sorted(twice)[0]!r}")
        numbers = {name: _number(value) for name, value in {**metrics, **times}.items()}
        self._rows.append({"step": step, **numbers})
        self._events.append(step, numbers)
        self._last = step

    def flush(self) -> None:
        """Put every row on the disk; a checkpoint is written only after this."""
        self._rows.flush()
        self._events.flush()

    def close(self) -> None:
        self._rows.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SamplesWriter:
    """Sampled texts in `samples.jsonl`: any number of rows a step, each with its `step`.

    folder: the run's folder. resume_step: the last step to keep; None or 0 starts anew.
    """

    def __init__(self, folder: Path, resume_step: int | None = None):
        self._rows = _row_file(Path(folder) / "samples.jsonl", resume_step or 0)

    def write(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append the samples of a step, as JSON values."""
        for sample in samples:
            self._rows.append({"step": step, **sample})

    def flush(self) -> None:
        """Put every row on the disk; a checkpoint is written only after this."""
        self._rows.flush()

    def close(self) -> None:
        self._rows.close()

    def __enter__(self) -> "SamplesWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`, with NaN and the infinities as numbers."""
    rows = read_rows(Path(folder) / "metrics.jsonl")
    return [{name: as_number(value) for name, value in row.items()} for row in rows]


def format_metrics(
    step: int,
    n_steps: int,
    metrics: Mapping[str, Any],
    times: Mapping[str, Any] | None = None,
    left: str = "",
    headline: Sequence[str] = (),
) -> str:
    """One line for the log: columns as wide as the numbers can be, so that lines of one run stand below each other.

    headline: the metrics that it shows after the loss, where those are not all.
    """
    cells = [f"step {step:>{len(str(n_steps))}}/{n_steps}"]
    cells += [f"{name} {_short(metrics[name]):<10}" for name in _shown(metrics, headline)]
    if times and "tokens_per_second" in times:
        cells.append(f"{_number(times['tokens_per_second']):>8,.0f} tokens/s")
    return "  ".join([*cells, left]).rstrip()


def format_held_out(metrics: Mapping[str, Any]) -> str:
    """The `val/…` metrics on a line of their own, shares with their 95 % interval; empty when there are none."""
    found = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
    cells = []
    for name, value in found.items():
        if name.endswith(("_low", "_high")):
            continue
        bounds = [found.get(f"{name}_{end}") for end in ("low", "high")]
        interval = "" if None in bounds else f" ({_short(bounds[0])} to {_short(bounds[1])})"
        cells.append(f"{name} {_short(value)}{interval}")
    return f"held out: {', '.join(cells)}" if cells else ""


def _shown(metrics: Mapping[str, Any], headline: Sequence[str]) -> list[str]:
    """What a log line tells of a step: the loss first; not what is on a line of its own, or nothing to speak of."""
    if headline:
        skipped = ("n_skipped",) if metrics.get("n_skipped") else ()
        return [name for name in ("loss", *headline, *skipped) if name in metrics]
    hidden = {"n_tokens", "loss"} | ({"n_skipped"} if not metrics.get("n_skipped") else set())
    hidden |= {"nll"} if metrics.get("nll") == metrics.get("loss") else set()
    names = [name for name in metrics if name not in hidden and not name.startswith("val/")]
    return (["loss"] if "loss" in metrics else []) + names


def _short(value: Any) -> str:
    number = _number(value)
    return str(number) if isinstance(number, int) else f"{number:.4g}"


class Progress:
    """A bar on a terminal, and a log line per update everywhere: loss, tokens/s, time left.

    n_steps: of the whole run. start: steps done before.
    """

    def __init__(self, n_steps: int, start: int = 0):
        self._n_steps = n_steps
        self._start = start
        self.headline: Sequence[str] = ()
        self._first: tuple[int, float] | None = None
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and processes.is_first():
            from tqdm import tqdm

            form = "{percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=self._n_steps, initial=self._start, file=sys.stderr, bar_format=form, leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def update(self, step: int, metrics: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        """Show the numbers of the step that was just done."""
        left = self._time_left(step)
        lines = [format_metrics(step, self._n_steps, metrics, times, left, self.headline), format_held_out(metrics)]
        if self._bar is not None:
            self._bar.clear()
        for line in filter(None, lines):
            log.info("%s", line)
        if self._bar is None:
            return
        shown = [f"loss {_short(metrics['loss'])}"] if "loss" in metrics else []
        shown += [f"{_number(times['tokens_per_second']):,.0f} tokens/s"] if "tokens_per_second" in times else []
        self._bar.n = step
        self._bar.set_postfix_str(", ".join([*shown, *([left] if left else [])]))

    def _time_left(self, step: int) -> str:
        """By the steps since the first update, whose time holds the compilation; nothing before there are any."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return ""
        seconds = (now - self._first[1]) / (step - self._first[0]) * (self._n_steps - step)
        return f"{datetime.timedelta(seconds=round(seconds))} left"
