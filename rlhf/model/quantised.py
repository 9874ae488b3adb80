"""Bases of 8 or 4 bits: the matrices of the layers as small codes and scales, made plain where they are used.

qwix makes the codes; the arrays keep their shapes and their leading axis of layers, so they go through the same scan
and are split over devices by the same rules. A layer is made plain inside its block: the plain form of one layer is
in memory at a time, and no gradient goes there.

| kind | code | scale | relative error of a normal matrix | bytes a weight |
|---|---|---|---|---|
| `int8` | 8 bits | float32, one for each output | 0.8 % | 1.0 |
| `nf4` | 4 bits (Dettmers et al., 2023, appendix E) | bfloat16, one for each 64 inputs of an output | 9.2 % | 0.53 |

On CPU a 4-bit array takes a byte a code. Embedding and norms stay as they are: the embedding is also the output layer,
which would have to be made plain as a whole for every batch, so that the peak of memory would not fall.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Kind = Literal["int8", "nf4"]
Tree = dict[str, Any]

# array of the layers -> the axes of its inputs, of which the last is cut into tiles; axis 0 is the layer
_INPUTS: dict[str, tuple[int, ...]] = {
    "query": (1,),
    "key_value": (1,),
    "out": (1, 2),
    "gate_up": (1,),
    "down": (1,),
}
_TILE = 64  # inputs that share a scale; where 64 does not divide them, the largest power of two that does

# Dettmers et al., 2023, appendix E
_NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def is_quantised(leaf: Any) -> bool:
    """Whether a node of a tree is codes and scales (a `qwix.QArray`)."""
    return hasattr(leaf, "qvalue")


def quantise(name: str, weight: Array, kind: Kind) -> Any:
    """A stacked array of the layers as codes and scales, a layer at a time; other arrays stay as they are."""
    if name not in _INPUTS:
        return weight
    one = _quantise_one(name, kind)
    is_here = isinstance(weight, jax.Array) and not isinstance(weight, jax.core.Tracer)
    if is_here and weight.devices() == {jax.devices("cpu")[0]} and jax.default_backend() == "cpu":
        return _in_place(one, np.asarray(weight))
    return jax.jit(lambda layers: jax.lax.map(one, layers))(weight)


def _in_place(one: Callable, layers: np.ndarray) -> Any:
    """Codes of all layers, on a CPU: compiled over the whole array, XLA would first copy it, bfloat16 into float32."""
    shapes = jax.eval_shape(one, jax.ShapeDtypeStruct(layers.shape[1:], layers.dtype))
    codes = jax.tree.map(lambda x: jnp.zeros((len(layers), *x.shape), x.dtype), shapes)
    write = jax.jit(
        lambda codes, layer, at: jax.tree.map(lambda whole, x: whole.at[at].set(x), codes, one(layer)), donate_argnums=0
    )
    for at, layer in enumerate(layers):
        codes = write(codes, layer, np.int32(at))
    return codes


def _quantise_one(name: str, kind: Kind) -> Callable:
    """What makes codes of a layer's matrix."""
    import qwix

    tiled = _INPUTS[name][-1]

    def one(layer: Array) -> Any:
        layer = layer[None].astype(jnp.float32)
        if kind == "int8":
            channels = [axis for axis in range(layer.ndim) if axis not in _INPUTS[name]]
            found = qwix.quantize(layer, "int8", channelwise_axes=channels)
        else:
            channels = [axis for axis in range(layer.ndim) if axis != tiled]
            tiles = {tiled: math.gcd(layer.shape[tiled], _TILE)}
            found = qwix.quantize(layer, "nf4", channelwise_axes=channels, tiled_axes=tiles, scale_dtype=jnp.bfloat16)
        return jax.tree.map(lambda x: x[0], found)

    return one


def quantiser(kind: Kind) -> Callable[[tuple[str, ...], Array], Any]:
    """What makes codes of the layers' matrices while parameters are read (`finish` of a source), a leaf at a time, so
    that the plain base is never there as a whole."""

    def finish(path: tuple[str, ...], leaf: Array) -> Any:
        return quantise(path[-1], leaf, kind) if path[:2] == ("model", "layers") else leaf

    return finish


def quantise_base(model: Tree, kind: Kind) -> Tree:
    """The base with its layers' matrices as codes. `model` is emptied on the way, so that no two bases exist."""
    layers = model["layers"]
    return {**model, "layers": {name: quantise(name, layers.pop(name), kind) for name in sorted(layers)}}


def dequantised(weight: Any, dtype: str) -> Array:
    """The plain array that codes and scales stand for. Shapes are kept, so an array that is split stays split."""
    codes, scale = weight.qvalue, weight.scale.astype(jnp.float32)
    values = jnp.asarray(_NF4)[codes.astype(jnp.int32)] if weight.qtype == "nf4" else codes.astype(jnp.float32)
    cut = [size for whole, n in zip(codes.shape, scale.shape, strict=True) for size in (n, whole // n)]
    spread = [size for n in scale.shape for size in (n, 1)]
    return (values.reshape(cut) * scale.reshape(spread)).reshape(codes.shape).astype(dtype)


def n_parameters(tree: Any) -> int:
    """Weights that a tree stands for: a code counts once and its scale not at all; single numbers are no weights."""
    leaves = jax.tree.leaves(tree, is_leaf=is_quantised)
    arrays = [leaf.qvalue if is_quantised(leaf) else leaf for leaf in leaves]
    return sum(math.prod(x.shape) for x in arrays if len(x.shape))


def n_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays where 4-bit codes are packed, as on an accelerator; on CPU such a code takes a byte."""

    def bits(x: Any) -> int:
        name = str(x.dtype)
        return 4 if name.endswith("int4") else 8 * x.dtype.itemsize

    return sum(math.prod(x.shape) * bits(x) for x in jax.tree.leaves(tree)) // 8
