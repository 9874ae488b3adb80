"""Weights for generation in fewer bits than the trainer's, multiplied in the form that is fast without a gradient.

A `Narrow` stands in a layer where an array stood. bfloat16 times bfloat16 is summed and returned in float32, which on
CPU is twice as fast as float32 and nine times as fast as the same product returned in bfloat16. int8 weights have one
scale for each output; the inputs are rounded to 8 bits too, with one scale for each token (Dettmers et al., 2022,
section 2.1, without its outlier part), and the sums are whole numbers.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["bfloat16", "int8"]

# matrices of a layer, and how many of their axes (without one of layers) are inputs
_MATRICES = {"query": 1, "key_value": 1, "out": 2, "gate_up": 1, "down": 1}


@jax.tree_util.register_pytree_node_class
class Narrow:
    """A matrix whose first axes are inputs and whose last axes are outputs.

    scale: [outputs], by which codes of int8 are multiplied; None for bfloat16.
    """

    def __init__(self, values: Any, scale: Any = None):
        self.values, self.scale = values, scale

    def tree_flatten(self) -> tuple[tuple, None]:
        return (self.values, self.scale), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple) -> "Narrow":
        return cls(*children)

    def astype(self, dtype: Any) -> "Narrow":
        """Itself: it is as it is multiplied."""
        return self

    def reshape(self, *shape: int) -> "Narrow":
        return Narrow(self.values.reshape(*shape), None if self.scale is None else self.scale.reshape(*shape[1:]))

    def __getitem__(self, places: tuple) -> "Narrow":
        """`[:, i]`: the i-th of several matrices of the same inputs."""
        return Narrow(self.values[places], None if self.scale is None else self.scale[places[1:]])

    def product(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time *out"]:
        """x · matrix, in x's type."""
        batch, time, width = x.shape
        flat, matrix = x.reshape(batch * time, width), self.values.reshape(width, -1)
        if self.scale is None:
            product = jnp.matmul(flat.astype(matrix.dtype), matrix, preferred_element_type=jnp.float32)
        else:
            flat = flat.astype(jnp.float32)
            unit = jnp.maximum(jnp.max(jnp.abs(flat), axis=-1, keepdims=True), 1e-30) / 127
            codes = jnp.round(flat / unit).astype(jnp.int8)
            sums = jnp.matmul(codes, matrix, preferred_element_type=jnp.int32)
            product = sums.astype(jnp.float32) * unit * self.scale.reshape(1, -1)
        return product.astype(x.dtype).reshape(batch, time, *self.values.shape[1:])


def is_narrow(leaf: Any) -> bool:
    return isinstance(leaf, Narrow)


def narrowed(layer: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """One layer with its matrices in few bits; norms and adapters stay as they are."""
    return {name: _narrow(x, _MATRICES[name], kind) if name in _MATRICES else x for name, x in layer.items()}


def _narrow(weight: Array, n_inputs: int, kind: Kind) -> Narrow:
    if kind == "bfloat16":
        return Narrow(weight.astype(jnp.bfloat16))
    largest = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=tuple(range(n_inputs)), keepdims=True)
    scale = jnp.maximum(largest, 1e-30) / 127
    codes = jnp.round(weight.astype(jnp.float32) / scale).astype(jnp.int8)
    return Narrow(codes, scale.reshape(weight.shape[n_inputs:]))
