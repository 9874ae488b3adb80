"""How often this process compiled, what, why a function was traced again, and what compiles later than it should.

Counts are taken from JAX's own events, from the import of this module on.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from rlhf.errors import TrainingError
from rlhf.sampling.ahead import IN_BACKGROUND

log = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"
_FROM_DISK = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One program made ready to run. seconds: the compiler's, or the reading's if it came from the cache on disk.
    is_ahead: in the background, before anybody needs it."""

    name: str
    seconds: float
    is_from_disk: bool
    is_ahead: bool = False


class _Listener:
    """Collects JAX's events. A hit in the cache on disk is reported inside the compilation it replaces."""

    def __init__(self) -> None:
        self.compilations: list[Compilation] = []
        self._thread = threading.local()

    def note_event(self, event: str, **details: Any) -> None:
        if event == _FROM_DISK:
            self._thread.is_hit = True

    def note_duration(self, event: str, duration_secs: float, **details: Any) -> None:
        if event == _COMPILED:
            is_hit = getattr(self._thread, "is_hit", False)
            self._thread.is_hit = False
            name = str(details.get("fun_name", "unnamed")).removeprefix("jit(").removesuffix(")")
            is_ahead = threading.current_thread().name.startswith(IN_BACKGROUND)
            self.compilations.append(Compilation(name, duration_secs, is_hit, is_ahead))


_listener = _Listener()
jax.monitoring.register_event_listener(_listener.note_event)
jax.monitoring.register_event_duration_secs_listener(_listener.note_duration)


def compilations() -> int:
    """Programs compiled, or read from the cache on disk, by this process so far."""
    return len(_listener.compilations)


def told(compilations: Sequence[Compilation]) -> str:
    """How many, how long they took, and of which functions."""
    if not compilations:
        return "no compilations"
    n_read = sum(one.is_from_disk for one in compilations)
    seconds = sum(one.seconds for one in compilations)
    counted = Counter(one.name for one in compilations).most_common()
    names = ", ".join(f"{name} × {n}" if n > 1 else name for name, n in counted)
    return f"{len(compilations)} compilations ({n_read} from the cache on disk) in {seconds:.1f} s: {names}"


@dataclasses.dataclass
class Recording:
    """The compilations inside a `record_compilations` block."""

    _start: int
    _stop: int | None = None

    @property
    def compilations(self) -> list[Compilation]:
        return _listener.compilations[self._start : self._stop]

    @property
    def names(self) -> Counter[str]:
        """How often each function was compiled."""
        return Counter(one.name for one in self.compilations)

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.compilations)

    def __len__(self) -> int:
        return len(self.compilations)

    def __str__(self) -> str:
        return told(self.compilations)


@contextlib.contextmanager
def record_compilations() -> Iterator[Recording]:
    """Record what is compiled in the block, by any thread."""
    recording = Recording(compilations())
    try:
        yield recording
    finally:
        recording._stop = compilations()


@contextlib.contextmanager
def forbid_compilations(what: str) -> Iterator[None]:
    """Fail if anything is compiled in the block.

    Raises:
        TrainingError: names `what` and the compiled functions.
    """
    with record_compilations() as recording:
        yield
    if len(recording):
        raise TrainingError(f"{what} must compile nothing new, but there were {recording}")


class Watch:
    """Compilations later than warm-up: in a part of a run that was there before, of a function that was too.

    The first time that a part is entered, or a function is needed, is a warm-up. is_forbidden: later, it is an error.
    n_late: programs compiled later so far.
    """

    def __init__(self, is_forbidden: bool = False):
        self.is_forbidden, self.n_late = is_forbidden, 0
        self._warm: set[str] = set()
        self._known: set[str] = set()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Something that is done again and again, by its name in messages.

        Raises:
            TrainingError: something was compiled after its warm-up, and that is forbidden; names the functions.
        """
        with record_compilations() as recording:
            yield
        is_first = name not in self._warm
        self._warm.add(name)
        found = recording.compilations
        late = [one for one in found if not one.is_ahead and one.name in self._known]
        self._known |= {one.name for one in found}
        if is_first or not late:
            return
        self.n_late += len(late)
        if self.is_forbidden:
            raise TrainingError(
                f"{name}, which had been done before, had {told(late)}; hardware.forbid_recompile=true makes this an "
                "error (lines above it in the log say what changed)"
            )
        log.warning("%s, which had been done before, had %s", name, told(late))


class TraceCounter:
    """Counts how often JAX traces a function, and logs why: which argument differs from the trace before.

    Wrap the function before it is jitted: `jax.jit(TraceCounter(step, "the step"))`. Calls that run without tracing
    don't count. what: its name in the log.
    """

    def __init__(self, function: Callable, what: str):
        functools.update_wrapper(self, function)
        self.function, self.what = function, what
        self.parameters = list(inspect.signature(function).parameters)
        self.n_traces = 0
        self._before: dict[str, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree_util.tree_flatten_with_path((args, kwargs))[0]
        if any(isinstance(leaf, jax.core.Tracer) for _, leaf in leaves):
            self._note({self._name(path): _describe(leaf) for path, leaf in leaves})
        return self.function(*args, **kwargs)

    def _name(self, path: tuple) -> str:
        """The path inside (args, kwargs), with parameters by name: "hp.beta", "batch['tokens']"."""
        _, place, *rest = path
        is_positional = isinstance(place, jax.tree_util.SequenceKey)
        name = self.parameters[place.idx] if is_positional else jax.tree_util.keystr((place,), simple=True)
        return name + jax.tree_util.keystr(tuple(rest))

    def _note(self, arguments: dict[str, str]) -> None:
        self.n_traces += 1
        before, self._before = self._before, arguments
        if self.n_traces == 1:
            return
        changed = [
            f"{key}: {before.get(key, 'absent')} → {arguments.get(key, 'absent')}"
            for key in {**before, **arguments}
            if before.get(key) != arguments.get(key)
        ]
        reason = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
        reason = reason or "another model, or arrays placed elsewhere"
        log.info("compiling %s once more (%d times in this process): %s", self.what, self.n_traces, reason)


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, jax.core.Tracer):
        return repr(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}{' (weak type)' if leaf.weak_type else ''}"
