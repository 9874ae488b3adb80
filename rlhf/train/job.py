"""What one training run works on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlhf.train.settings import TrainerSettings


@runtime_checkable
class Batches(Protocol):
    """Training data by position: batch k of a run is the same whenever it is asked for."""

    @property
    def n_rows(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def __getitem__(self, step: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass
class Job:
    """Everything one training run works on.

    trainable, frozen: components of the parameters; the update changes (and consumes) `trainable` only.
    record: what a checkpoint says about the run besides its arrays (config, versions); must be JSON.
    evaluate(params, is_start), sample(params, step): optional; metrics and rows for the log. is_start: the parameters
        are those that the run began with.
    first_look(make): the held-out metrics before the first step, from `make` unless another run has begun alike.
    is_noisy: the loss draws random numbers (dropout): the component `noise` has one for each row of a step.
    forbid_recompile: compiling in a part of the run that was done before is an error, not a warning.
    """

    folder: Path
    model: Any
    algorithm: Any
    runtime: Any
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    batches: Batches
    held_out: dict[str, np.ndarray] | None
    settings: TrainerSettings
    seed: int
    record: dict[str, Any]
    mesh: Any = None
    evaluate: Callable[[dict, bool], dict[str, float]] | None = None
    sample: Callable[[dict, int], list[dict]] | None = None
    first_look: Callable[[Callable[[], dict]], dict] = lambda make: make()
    resume: bool = False
    is_noisy: bool = False
    forbid_recompile: bool = False
