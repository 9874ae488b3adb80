"""The best parameters of a run by one of its held-out metrics, kept in `best/` beside `checkpoints/`.

`model.checkpoint=RUN/best` starts from them. They are no state to go on with: `resume` uses the newest checkpoint.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf import processes
from rlhf.errors import TrainingError
from rlhf.train.checkpoint import Checkpoints, read_record
from rlhf.train.durable import remove_folder

log = logging.getLogger(__name__)

FOLDER = "best"


class Best:
    """Keeps the parameters whenever the metric is better than it ever was; equal is not better.

    folder: the run's. metric: its name in the log, such as `val/accuracy`; None: nothing is kept.
    start: the step that the run goes on after; what was kept later than that is done again.
    measured: settings by name that the metric is measured with, as JSON. A value that was measured with others is not
        comparable: the search begins anew, with a warning.
    """

    def __init__(
        self,
        folder: Path,
        metric: str | None,
        better: Literal["higher", "lower"],
        start: int,
        measured: Mapping[str, Any] | None = None,
    ):
        self.metric, self.sign = metric, 1 if better == "higher" else -1
        settings = {"trainer.best_metric": metric, "trainer.best_is": better, **(measured or {})}
        self._of: dict[str, Any] = json.loads(json.dumps(settings))  # as it comes back from a record
        self._kept = Checkpoints(folder / FOLDER, max_to_keep=1)
        self._value = -math.inf
        for step in self._kept.steps():
            if step > start or start == 0:
                if processes.is_first():
                    remove_folder(self._kept.path(step))
            elif metric is not None:
                self._value = self._value_of(step)

    def _value_of(self, step: int) -> float:
        """The kept value, signed; as if nothing was kept, where it is of another metric or measured otherwise."""
        best = read_record(self._kept.path(step))["best"]
        of = best.get("of", {})
        stored = {**self._of, "trainer.best_metric": best.get("metric"), **of}  # an older record has the metric alone
        changed = [name for name in sorted({*stored, *self._of}) if stored.get(name) != self._of.get(name)]
        if not changed:
            return self.sign * best["value"]
        log.warning(
            "the best so far was of %s (%.4g at step %d) and kept with another %s: looking for the best %s anew",
            *(stored["trainer.best_metric"], best["value"], step, " and ".join(changed), self.metric),
        )
        return -math.inf

    def offer(self, step: int, metrics: Mapping[str, float], params: Any, record: Mapping[str, Any]) -> None:
        """Keep `params` if the metric is the best so far.

        Raises:
            TrainingError: the metric is not among those that were measured.
        """
        if self.metric is None:
            return
        if self.metric not in metrics:
            found = ", ".join(sorted(name for name in metrics if name.startswith("val/"))) or "none"
            raise TrainingError(
                f"trainer.best_metric={self.metric} is not measured by this run; held out there are: {found}"
            )
        value = metrics[self.metric]
        if not self.sign * value > self._value:
            return
        self._value = self.sign * value
        best = {"metric": self.metric, "value": value, "of": self._of}
        self._kept.save(step, {"params": params}, {**record, "best": best})
        log.info("best so far: %s %.4g at step %d, kept in %s", self.metric, value, step, self._kept.path(step))
