"""Several schedules at once: how a small model keeps all cores of a processor busy.

XLA runs a matrix product of few rows with a small matrix on one core, whatever there are. So the prompts of a call are
dealt out to schedules with a thread each, all of one shape and so of one set of programs. Where the weights don't fit
into the processor's cache, as many threads as there are read them from memory, which costs more than it brings.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from rlhf.model.gemma3 import Tree
from rlhf.sampling.programs import Setting
from rlhf.sampling.schedule import Ended, Schedule, Task
from rlhf.sampling.shapes import Shape

_CACHED = 2**25  # bytes of weights that stay in the last cache of a processor (docs/sampling.md has what was measured)
_FEWEST_ROWS = 16  # of a schedule


@dataclasses.dataclass(frozen=True)
class Parts:
    """Into how many equal schedules a shape is divided, and the shape of each."""

    n: int
    shape: Shape

    def __str__(self) -> str:
        return f"{self.n} × {self.shape}" if self.n > 1 else str(self.shape)


def parts_of(setting: Setting, shape: Shape, weights: Tree) -> Parts:
    """How a call of this shape runs on this machine; one schedule wherever more would not be faster."""
    is_eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    is_small = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights)) <= _CACHED
    if jax.default_backend() != "cpu" or setting.mesh is not None or is_eager or not is_small:
        return Parts(1, shape)
    n = max(1, min(_cores(), shape.entries, shape.rows // _FEWEST_ROWS))
    return Parts(n, dataclasses.replace(shape, entries=-(-shape.entries // n)))


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_side_by_side(
    parts: Parts, tasks: Sequence[Task], make: Callable[[Sequence[Task]], Schedule], every: int | None
) -> tuple[list[Ended], float]:
    """All answers, and the share of places in which a token was drawn.

    Task i is of schedule i modulo their number: which it is depends on nothing else, and neither does its answer.
    make: a schedule for some of the tasks. every: see `Schedule.run`.
    """
    is_over = threading.Event()  # one has failed, or the caller was interrupted

    def run(part: int) -> tuple[list[Ended], Schedule]:
        schedule, ended = make(tasks[part :: parts.n]), []
        try:
            for some in schedule.run(every):
                ended += [dataclasses.replace(one, task=part + one.task * parts.n) for one in some]
                if is_over.is_set():
                    break
        except BaseException:
            is_over.set()
            raise
        return ended, schedule

    numbers = range(min(parts.n, len(tasks)))
    if len(numbers) == 1:
        done = [run(0)]
    else:
        with ThreadPoolExecutor(len(numbers), thread_name_prefix="rlhf-answers") as pool:
            futures = [pool.submit(run, part) for part in numbers]
            try:
                done = [future.result() for future in futures]
            finally:
                is_over.set()
    schedules = [schedule for _, schedule in done]
    utilisation = sum(one.n_drawn for one in schedules) / sum(one.n_places for one in schedules)
    return [one for ended, _ in done for one in ended], utilisation
