"""Random arrays by seed and name, drawn on the host: nothing to compile, and the same on every device and mesh."""

import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np

_PART = 1 << 20  # numbers that one thread draws at a time: large arrays are drawn by all processors
_ALIGNMENT = 64  # bytes


def normal(seed: int, name: str, shape: tuple[int, ...], deviation: float, dtype: str) -> np.ndarray:
    """N(0, deviation²) from a generator of its own: other arrays may come and go without changing it."""
    drawn = _aligned(math.prod(shape), jnp.dtype(dtype))

    def fill(number: int) -> None:
        part = drawn[number * _PART : (number + 1) * _PART]
        stream = np.random.Philox(key=[seed, zlib.crc32(name.encode())]).jumped(number)
        values = part if part.dtype == np.float32 else np.empty(part.size, np.float32)
        np.random.Generator(stream).standard_normal(dtype=np.float32, out=values)
        np.multiply(values, np.float32(deviation), out=values)
        if values is not part:
            part[:] = values

    n_parts = -(-drawn.size // _PART)
    if n_parts <= 1:
        fill(0)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(n_parts)))
    return drawn.reshape(shape)


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Memory that begins where JAX on a CPU wants it, so that `jax.device_put` need not copy it."""
    memory = np.empty(size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size * dtype.itemsize].view(dtype)
