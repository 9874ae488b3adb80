"""The parameters as decoding reads them: one tree for each layer, in the type of generation.

A slice of the stacked weights inside the loop over tokens would copy them for every token, so they are taken apart
once, and kept for as long as the same parameters are generated with. What is as it should be (the embedding, in the
same type) is not copied.
"""

import dataclasses
import weakref
from functools import partial
from typing import Any, Literal

import jax
from jaxtyping import Array

from rlhf.model import narrow
from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.model.lora import compute_layer, split_layers, stacked_layers
from rlhf.model.narrow import is_narrow, narrowed

Kind = Literal["float32", "bfloat16", "int8"]


class DecodingWeights:
    """The weights of the newest parameters, in the layout of decoding.

    kind: float32 or bfloat16 for weights and activations; with int8 the matrices of the layers are int8, the rest is
        bfloat16. None is the model's own type.
    """

    def __init__(self, model: Gemma3, kind: Kind | None = None):
        dtype = "bfloat16" if kind == "int8" else kind or model.compute_dtype
        self.model = dataclasses.replace(model, compute_dtype=dtype)
        self.narrow: narrow.Kind | None = "int8" if kind == "int8" else "bfloat16" if dtype == "bfloat16" else None
        self._kept: dict[str, tuple[list[Any], Any]] = {}

    def of(self, params: Tree) -> Tree:
        """The weights that `params` are, made again only when an array of it is another one.

        The base and its adapter are kept apart: with the adapter on or off, the base is in memory once.
        """
        base = self._once("base", params["model"], self._base)
        layers = base["layers"]
        if "adapter" in params:
            adapter = {name: params[name] for name in ("adapter", "adapter_scale")}
            extra = self._once("adapter", adapter, partial(self._adapter, params["model"]))
            layers = [{**layer, **part} for layer, part in zip(layers, extra, strict=True)]
        vision = {"vision": params["vision"]} if "vision" in params else {}
        return {"model": {**base, "layers": layers}, **vision}

    def release(self) -> None:
        """Let go of what is kept."""
        self._kept.clear()

    def _base(self, tree: Tree) -> Tree:
        rest = {name: _cast(x, self.model.compute_dtype) for name, x in tree.items() if name != "layers"}
        return {**rest, "layers": self.layers_of(tree)}

    def layers_of(self, tree: Tree) -> list[Tree]:
        """The layers of the component `model`, one tree for each; nothing is kept."""
        return _split(tree["layers"], self.model.compute_dtype, self.narrow)

    def _adapter(self, model: Tree, adapter: Tree) -> list[Tree]:
        stacked = stacked_layers({"model": model, **adapter})
        return _split({name: stacked[name] for name in adapter}, self.model.compute_dtype, None)

    def _once(self, name: str, tree: Tree, make: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        known = self._kept.get(name)
        if known is None or [id(ref()) for ref in known[0]] != [id(x) for x in leaves]:
            self._kept.pop(name, None)  # let go of before the next is made
            self._kept[name] = ([weakref.ref(x) for x in leaves], make(tree))
        return self._kept[name][1]


def _cast(x: Array, dtype: str) -> Array:
    return x if x.dtype == dtype else _compiled_cast(x, dtype)


@partial(jax.jit, static_argnames="dtype")
def _compiled_cast(x: Array, dtype: str) -> Array:
    return x.astype(dtype)


@partial(jax.jit, static_argnames=("dtype", "kind"))
def _split(stacked: Tree, dtype: str, kind: narrow.Kind | None) -> list[Tree]:
    if kind == "int8":  # rounded once, from what is there
        layers = split_layers(compute_layer(stacked, "float32"))
        return [
            {name: x if is_narrow(x) else x.astype(dtype) for name, x in narrowed(layer, kind).items()}
            for layer in layers
        ]
    layers = split_layers(compute_layer(stacked, dtype))
    return layers if kind is None else [narrowed(layer, kind) for layer in layers]
