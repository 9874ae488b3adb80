"""The program of the update, compiled while the run takes its first look at held-out rows."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax

from rlhf import processes
from rlhf.sampling.ahead import IN_BACKGROUND

_known: set[Any] = set()


def is_possible() -> bool:
    """On a CPU only: the compiler of a GPU times kernels to choose among them, and must be alone for that; and several
    processes must compile in one order."""
    return jax.default_backend() == "cpu" and not processes.is_several()


@contextlib.contextmanager
def compiled_meanwhile(function: Any, *args: Any, **static: Any) -> Iterator[None]:
    """Another thread compiles a jitted function for such arguments during the block; when it ends, that is done.

    What was compiled so before is left alone. An error of the compiler is not told here: the first call has it too.
    """
    leaves, structure = jax.tree.flatten(args)
    name = (function, structure, tuple((x.shape, str(x.dtype)) for x in leaves), tuple(sorted(static.items(), key=str)))
    if name in _known:
        yield
        return

    def run() -> None:
        with contextlib.suppress(Exception):
            function.lower(*args, **static).compile()
            _known.add(name)

    thread = threading.Thread(target=run, name=IN_BACKGROUND, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
