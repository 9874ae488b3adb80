"""Parts of large arrays, taken so that their gradients are written once, where they belong."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf.model.lora import split_layers

Tree = dict[str, Any]


@jax.custom_vjp
def _unstack(stacked: Tree) -> list[Tree]:
    n_layers = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n_layers)]


# The gradient of n slices would be n full-sized arrays added up; stacking the parts writes each once.
_unstack.defvjp(
    lambda stacked: (_unstack(stacked), None),
    lambda _, parts: (jax.tree.map(lambda *xs: jnp.stack(xs), *parts),),
)


@jax.custom_vjp
def looked_up(embedding: Array, tokens: Array) -> tuple[Array, Array]:
    """Rows of the embedding, and the embedding itself, for whoever uses it later."""
    return embedding[tokens], embedding


# The later use's gradient is there first, and that of the rows is added into it: apart from each other, they would be
# two arrays of the embedding's size.
looked_up.defvjp(
    lambda embedding, tokens: (looked_up(embedding, tokens), tokens),
    lambda tokens, parts: (parts[1].at[tokens].add(parts[0]), None),
)


def each_layer(stacked: Tree) -> list[Tree]:
    """One tree for each layer; beside an adapter, the base needs no gradient, and codes of it have none."""
    if "adapter" not in stacked:
        return _unstack(stacked)
    base = split_layers({name: x for name, x in stacked.items() if name != "adapter"})
    return [{**layer, "adapter": part} for layer, part in zip(base, _unstack(stacked["adapter"]), strict=True)]
