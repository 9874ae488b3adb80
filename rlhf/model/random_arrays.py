"""Random arrays by seed and name, drawn on the host: nothing to compile, and the same on every device and mesh."""

import zlib

import jax.numpy as jnp
import numpy as np


def normal(seed: int, name: str, shape: tuple[int, ...], deviation: float, dtype: str) -> np.ndarray:
    """N(0, deviation²) from a generator of its own: other arrays may come and go without changing it."""
    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    drawn = generator.standard_normal(shape, dtype=np.float32)
    drawn *= np.float32(deviation)
    return drawn.astype(jnp.dtype(dtype), copy=False)
