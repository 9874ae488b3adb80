"""The keys under `trainer`: how long, how often, how many to keep."""

import math
from typing import Literal

from rlhf.config import config, require_range
from rlhf.errors import ConfigError


@config
class TrainerSettings:
    """Length and rhythm of a run. A step is one batch: one `prepare` and the optimizer steps that follow from it.

    max_steps: stop after so many steps; epochs: or after so many passes over the data; the smaller counts if both are
        given.
    log_every, eval_every, checkpoint_every, samples_every: in steps; 0 switches off. Held-out metrics are also measured
        before the first step and after the last, and a checkpoint is always written at the end.
    eval_rows: held-out rows that `val/…` metrics are measured on; 0 switches them off.
    best_metric: a held-out metric, such as `val/accuracy`: the parameters of its best value, `higher` or `lower`, are
        kept in the folder `best`.
    eager: run without compilation, so that breakpoints work and the first NaN raises where it is made.
    on_nonfinite: `stop` the run at a loss or gradient that is not finite, or `skip` that update and count it.
    """

    max_steps: int | None = None
    epochs: float | None = 1.0
    log_every: int = 1
    eval_every: int = 0
    eval_rows: int = 256
    checkpoint_every: int = 0
    max_to_keep: int = 2
    allow_older_checkpoint: bool = False
    samples_every: int = 0
    n_samples: int = 4
    best_metric: str | None = None
    best_is: Literal["higher", "lower"] = "higher"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    eager: bool = False

    def __post_init__(self):
        for name in ("log_every", "eval_every", "checkpoint_every", "samples_every", "eval_rows"):
            require_range(self, name, at_least=0)
        for name in ("max_to_keep", "n_samples", "max_steps"):
            require_range(self, name, at_least=1)
        require_range(self, "epochs", above=0)
        if self.max_steps is None and self.epochs is None:
            raise ConfigError("trainer.max_steps and trainer.epochs are both none: give one of them")

    def n_steps(self, n_rows: int, batch_size: int) -> int:
        """Steps of a run over `n_rows` rows."""
        by_epochs = math.inf if self.epochs is None else math.ceil(self.epochs * n_rows / batch_size)
        return int(min(by_epochs, math.inf if self.max_steps is None else self.max_steps))
