"""The parts of a Gemma 3 block, as functions of arrays. Nothing here knows about stacks, caches or configs."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf.model.narrow import Narrow


def rms_norm(x: Float[Array, "... width"], weight: Float[Array, "width"], eps: float) -> Float[Array, "... width"]:
    """x / rms(x) · (1 + weight), computed in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = (1.0 + weight.astype(jnp.float32)).reshape((1,) * (x.ndim - 1) + weight.shape)
    return (normed * scale).astype(x.dtype)


def rope_tables(
    positions: Int[Array, "batch time"], head_width: int, base: float, scale: float
) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
    """Sine and cosine of each position's angles (Su et al., 2021, eq. 15); positions are divided by `scale`."""
    exponents = jnp.arange(head_width // 2, dtype=jnp.float32) * (2.0 / head_width)
    inverse_wavelength = jnp.asarray(base, jnp.float32) ** -exponents / scale
    angles = positions.astype(jnp.float32)[..., None] * inverse_wavelength[None, None, :]
    return jnp.sin(angles), jnp.cos(angles)


def rotate(
    x: Float[Array, "batch time heads head_width"],
    sin: Float[Array, "batch time half"],
    cos: Float[Array, "batch time half"],
) -> Float[Array, "batch time heads head_width"]:
    """Rotate the two halves of each head (not interleaved pairs)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = sin[:, :, None, :], cos[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention_mask(
    query_positions: Int[Array, "batch queries"],
    query_segments: Int[Array, "batch queries"],
    key_positions: Int[Array, "batch keys"],
    key_segments: Int[Array, "batch keys"],
    window: int | None = None,
    prefixes: Int[Array, "batch queries"] | None = None,
    query_images: Int[Array, "batch queries"] | None = None,
    key_images: Int[Array, "batch keys"] | None = None,
) -> Bool[Array, "batch queries keys"]:
    """Who sees whom: keys of the same segment, not later, and with a window only the query and window - 1 before it.

    Segment 0 is padding: it sees nothing and is not seen. prefixes: a second segment that a query sees, whose
    continuation its own is (0: none). query_images, key_images: the image that a token is part of (0: text); tokens of
    one image see each other, later ones too, but with a window none farther back than text does.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    if prefixes is not None:
        same |= prefixes[:, :, None] == key_segments[:, None, :]
    is_due = distance >= 0
    if query_images is not None and key_images is not None:
        is_due |= (query_images[:, :, None] == key_images[:, None, :]) & (key_images > 0)[:, None, :]
    visible = same & (key_segments[:, None, :] > 0) & is_due
    return visible if window is None else visible & (distance < window)


def project(
    x: Float[Array, "batch time width"], weight: Float[Array, "width *out"] | Narrow
) -> Float[Array, "batch time *out"]:
    """x · weight over the width, as a product of two matrices.

    With batch and time as two axes, XLA on CPU transposes a copy of the whole gradient before it multiplies by it.
    """
    if isinstance(weight, Narrow):
        return weight.product(x)
    batch, time, width = x.shape
    product = x.reshape(batch * time, width) @ weight.reshape(width, -1)
    return product.reshape(batch, time, *weight.shape[1:])


def project_attention(
    x: Float[Array, "batch time width"],
    query: Float[Array, "width heads head_width"] | Narrow,
    key_value: Float[Array, "width two kv_heads head_width"] | Narrow,
    is_joint: bool,
) -> tuple[Array, Array, Array]:
    """Queries [batch, time, heads, head_width], keys and values [batch, time, kv_heads, head_width].

    is_joint: as one product. Side by side, the matrices are small against their input, whose gradient is then one
        product instead of three and two sums; not where heads are split over devices, each with its own of both.
    """
    if not is_joint or isinstance(query, Narrow) or isinstance(key_value, Narrow):
        both = project(x, key_value)
        return project(x, query), both[:, :, 0], both[:, :, 1]
    width, heads, head_width = query.shape
    kv_heads = key_value.shape[2]
    matrix = jnp.concatenate([query.reshape(width, -1), key_value.reshape(width, -1)], axis=1)
    product = project(x, matrix).reshape(*x.shape[:2], heads + 2 * kv_heads, head_width)
    return product[:, :, :heads], product[:, :, heads : heads + kv_heads], product[:, :, heads + kv_heads :]


def gated_mlp(
    x: Float[Array, "batch time width"],
    gate_up: Float[Array, "width two ff"] | Narrow,
    down: Float[Array, "ff width"] | Narrow,
    add: Callable[..., Array] = lambda x, **outputs: next(iter(outputs.values())),
) -> Float[Array, "batch time width"]:
    """GeGLU with the tanh approximation; gate and up are one matrix product.

    add: adds low-rank terms to the outputs of projections (`rlhf.model.lora.adapt`).
    """
    inner = _geglu(add(x, gate_up=project(x, gate_up)))
    return add(inner, down=project(inner, down))


@jax.custom_vjp
def _geglu(gate_up: Float[Array, "batch time two ff"]) -> Float[Array, "batch time ff"]:
    return jax.nn.gelu(gate_up[:, :, 0], approximate=True) * gate_up[:, :, 1]


def _geglu_backward(gate_up: Array, gradient: Array) -> tuple[Array]:
    """Both gradients written once: those of two slices would be two padded arrays added up."""
    gelu, pull_back = jax.vjp(partial(jax.nn.gelu, approximate=True), gate_up[:, :, 0])
    return (jnp.stack([pull_back(gradient * gate_up[:, :, 1])[0], gradient * gelu], axis=2),)


_geglu.defvjp(lambda gate_up: (_geglu(gate_up), gate_up), _geglu_backward)
