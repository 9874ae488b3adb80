"""What makes JAX fast on a CPU: memory that stays with the process, and less time spent on optimising programs."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_LARGEST = 2**31 - 1
_MUCH = 2**29  # bytes of freed memory that are worth giving back
_is_kept = False


def prepare_processor(keep_memory: bool = True) -> None:
    """Call before the first array is made; experiments/speed has what each part brings.

    keep_memory: steps are faster, but what a program worked in may be there twice: a freed block of which a small one
    took a piece is too small for the next step.
    """
    if keep_memory:
        _keep_memory()
    _optimise_little()


def _keep_memory() -> None:
    """Let freed memory stay with the process, and run programs in the thread that calls them.

    XLA asks for a program's memory anew each time, and the system hands it out page by page and clears every page. The
    second part is what makes the first work: glibc keeps large blocks for the main thread only. Elsewhere than with
    glibc (Linux) nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    global _is_kept
    libc = ctypes.CDLL(None)
    if libc.mallopt(_M_MMAP_MAX, 0) == 1 and libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST) == 1:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _is_kept = True


class _Counts(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    ]


@contextlib.contextmanager
def in_between(is_other: bool = True) -> Iterator[None]:
    """For other work between optimizer steps, such as writing answers: freed memory goes back to the system before and
    after it. Blocks that one of the two has freed seldom fit the other, which would take new ones beside them."""
    if is_other:
        _give_back()
    yield
    if is_other:
        _give_back()


def _give_back() -> None:
    """Return memory that is kept and free, where it is much: taking it anew costs time."""
    counts = getattr(ctypes.CDLL(None), "mallinfo2", None) if _is_kept else None  # glibc 2.33 and later
    if counts is None:
        return
    counts.restype = _Counts
    if counts().fordblks > _MUCH:
        ctypes.CDLL(None).malloc_trim(0)


def _optimise_little() -> None:
    """LLVM's first level instead of its third, unless `XLA_FLAGS` says which: programs are ready sooner, and the loops
    between matrix products don't run slower for it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1".strip()
