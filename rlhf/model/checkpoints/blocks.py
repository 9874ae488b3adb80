"""Freed memory goes back to the system while a checkpoint is read.

glibc learns to keep freed blocks of up to 32 MB for later, in each thread's own heap. Reading frees hundreds of such
blocks in several threads; of the 1B checkpoint 0.3 GB stayed with the process for nothing.
"""

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LEARNT = 32 * 2**20  # where glibc arrives by itself; it keeps twice as much at the end of the heap


@contextlib.contextmanager
def go_back() -> Iterator[None]:
    """Blocks from 1 MB on are returned when they are freed. Elsewhere than on glibc this does nothing."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _LEARNT)
        set_option(_TRIM_THRESHOLD, 2 * _LEARNT)
