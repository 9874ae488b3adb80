"""Low-rank adapters (Hu et al., 2022): a tree beside the parameters, applied in the linear maps, never added to them.

    params["adapter"] = {"layers": {projection: {"a": [layers, in, rank], "b": [layers, rank, out]}}}
    params["adapter_scale"] = alpha / rank, or alpha / sqrt(rank)

A projection's output is x · W + scale · dropout(x) · A · B. Without these components nothing is computed, so an adapter
that is off makes no difference at all. Adapters are float32 whatever the base is.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError, nearest
from rlhf.model.narrow import is_narrow
from rlhf.model.quantised import dequantised, is_quantised

Tree = dict[str, Any]

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
SETS = {"qv": ("q", "v"), "attention": PROJECTIONS[:4], "mlp": PROJECTIONS[4:], "all": PROJECTIONS}
COMPONENTS = ("adapter", "adapter_scale", "adapter_dropout", "noise")

# array of the base, and which projection each place of its axis 2 is; None: all of it is one
_HOMES: dict[str, tuple[str, int | None]] = {
    "q": ("query", None),
    "k": ("key_value", 0),
    "v": ("key_value", 1),
    "o": ("out", None),
    "gate": ("gate_up", 0),
    "up": ("gate_up", 1),
    "down": ("down", None),
}
# What a block keeps for its backward pass: results of projections (of an adapted one the sum, not its parts) and of the
# attention, but not queries × keys.
KEPT_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("adapted", "mixed"),
)
_PER_LAYER = ("adapter_scale", "adapter_dropout", "noise")


@config
class LoRA:
    """Settings of an adapter.

    rank: of the change of each matrix; null: no adapter, every parameter is trained.
    alpha: the change is multiplied by alpha / rank.
    dropout: share of an adapter's inputs set to zero in training; never in evaluation, sampling or a reference.
    targets: `qv`, `attention`, `mlp`, `all`, or a list of q, k, v, o, gate, up, down.
    rank_stabilised: multiply by alpha / sqrt(rank) instead (Kalajdzievski, 2023, eq. 4).
    """

    rank: int | None = None
    alpha: Number = 16.0
    dropout: Number = 0.0
    targets: str | tuple[str, ...] = "all"
    rank_stabilised: bool = False

    def __post_init__(self):
        require_range(self, "rank", at_least=1)
        require_range(self, "alpha", above=0)
        require_range(self, "dropout", at_least=0, at_most=0.99)
        if isinstance(self.targets, str) and self.targets not in SETS:
            raise ConfigError(f"targets={self.targets!r} of LoRA must be {', '.join(SETS)} or a list of projections")
        for name in self.projections:
            if name not in PROJECTIONS:
                known = ", ".join(PROJECTIONS)
                raise ConfigError(f"targets of LoRA has {name!r}, known are {known}{nearest(name, PROJECTIONS)}")
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise ConfigError(f"targets={list(self.targets)} of LoRA must name one projection or more, each once")

    @property
    def projections(self) -> tuple[str, ...]:
        return SETS[self.targets] if isinstance(self.targets, str) else self.targets

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        assert self.rank is not None
        return float(self.alpha) / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def is_like(self, other: "LoRA") -> bool:
        """Whether both describe the same function of the same arrays."""
        same = self.rank == other.rank and set(self.projections) == set(other.projections)
        return same and other.rank is not None and math.isclose(self.scale, other.scale, rel_tol=1e-6)


def sizes(a: Any) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection of an `Architecture`."""
    queries, keys = a.heads * a.head_width, a.kv_heads * a.head_width
    return {
        "q": (a.width, queries),
        "k": (a.width, keys),
        "v": (a.width, keys),
        "o": (queries, a.width),
        "gate": (a.width, a.ff_width),
        "up": (a.width, a.ff_width),
        "down": (a.ff_width, a.width),
    }


def adapter_shapes(a: Any, lora: LoRA) -> Tree:
    """Shape of every adapter array; the tree is the tree of the component `adapter`."""
    found = {name: sizes(a)[name] for name in lora.projections}
    layers = {
        name: {"a": (a.layers, n_in, lora.rank), "b": (a.layers, lora.rank, n_out)}
        for name, (n_in, n_out) in found.items()
    }
    return {"layers": layers}


def abstract_adapter(a: Any, lora: LoRA) -> Tree:
    """Shapes and types of an adapter, without memory."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        adapter_shapes(a, lora),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@partial(jax.jit, static_argnums=(1, 2))
def _draw(key: Array, a: Any, names_and_rank: tuple) -> Tree:
    names, rank = names_and_rank
    layers = {}
    for name in names:
        n_in, n_out = sizes(a)[name]
        bound = n_in**-0.5
        place = jax.random.fold_in(key, PROJECTIONS.index(name))
        start = jax.random.uniform(place, (a.layers, n_in, rank), jnp.float32, -bound, bound)
        layers[name] = {"a": start, "b": jnp.zeros((a.layers, rank, n_out), jnp.float32)}
    return {"layers": layers}


def draw_adapter(key: Array, a: Any, lora: LoRA) -> Tree:
    """An adapter that changes nothing yet: A uniform in ± 1 / sqrt(inputs), B zero.

    That is peft's start: Kaiming-uniform with slope sqrt(5) (He et al., 2015, eq. 14) has just this bound.
    """
    return _draw(key, a, (lora.projections, lora.rank))


def stacked_layers(params: Tree, n_rows: int = 0) -> Tree:
    """What a scan over `Gemma3.block` takes: the base's layers, with what an adapter needs in each.

    n_rows: of the batch that runs through them, for dropout.
    """
    layers = dict(params["model"]["layers"])
    if "adapter" not in params:
        return layers
    n_layers = jax.tree.leaves(params["adapter"])[0].shape[0]
    layers["adapter"] = params["adapter"]["layers"]
    layers["adapter_scale"] = jnp.broadcast_to(params["adapter_scale"], (n_layers,))
    if "noise" in params and "adapter_dropout" in params:
        layers["adapter_dropout"] = jnp.broadcast_to(params["adapter_dropout"], (n_layers,))
        fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
        layers["noise"] = jax.vmap(fold, in_axes=(None, 0))(_row_keys(params["noise"], n_rows), jnp.arange(n_layers))
    return layers


def _row_keys(noise: Array, n_rows: int) -> Array:
    """A random key for each row of a batch whose examples have one number each; an example may be several rows."""
    n_each = -(-n_rows // noise.shape[0])
    keys = jax.vmap(jax.random.key)(jnp.repeat(noise, n_each))
    return jax.vmap(jax.random.fold_in)(keys, jnp.tile(jnp.arange(n_each), noise.shape[0]))[:n_rows]


def split_layers(stacked: Tree) -> list[Tree]:
    """One tree for each layer."""
    n_layers = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n_layers)]


def compute_layer(layer: Tree, dtype: str) -> Tree:
    """The arrays of a layer (or of a stack of them) as they are used: dequantised and cast; a second time free."""
    fixed = {name: layer[name] for name in _PER_LAYER if name in layer}
    rest = {name: x for name, x in layer.items() if name not in fixed}
    return fixed | jax.tree.map(
        lambda w: dequantised(w, dtype) if is_quantised(w) else w.astype(dtype),
        rest,
        is_leaf=lambda w: is_quantised(w) or is_narrow(w),
    )


def adapt(layer: Tree) -> Callable[..., Any]:
    """A function that adds a layer's low-rank terms to the outputs of its projections.

    The function takes the input x and an output for each name, and returns the outputs: `add(x, q=…, k=…, v=…)`. Names
    joined by `_` are one output of [batch, time, names, out]. Projections of the same input share one product with A
    and one dropout mask.
    """
    adapter = layer.get("adapter", {})

    def add(x: Float[Array, "batch time width"], **outputs: Array) -> Any:
        names = [name for joined in outputs for name in joined.split("_") if name in adapter]
        if not names:
            return tuple(outputs.values()) if len(outputs) > 1 else next(iter(outputs.values()))
        x = _dropped(layer, x, PROJECTIONS.index(names[0]))
        inner = x.reshape(-1, x.shape[-1]) @ jnp.concatenate([adapter[name]["a"] for name in names], axis=1)
        inner = (inner * layer["adapter_scale"]).astype(x.dtype)
        found, start = [], 0
        for joined, output in outputs.items():
            own = [name for name in joined.split("_") if name in adapter]
            width = sum(adapter[name]["b"].shape[0] for name in own)
            if own:
                second = _second(adapter, joined.split("_"))
                output = output + (inner[:, start : start + width] @ second).reshape(output.shape)
                output = checkpoint_name(output, "adapted")
            start += width
            found.append(output)
        return tuple(found) if len(found) > 1 else found[0]

    return add


def _second(adapter: Tree, names: list[str]) -> Float[Array, "ranks outs"]:
    """B of one projection, or the block-diagonal of those whose outputs lie side by side."""
    if len(names) == 1:
        return adapter[names[0]]["b"]
    present = [(place, adapter[name]["b"]) for place, name in enumerate(names) if name in adapter]
    rows = []
    for place, b in present:
        blocks = [b if at == place else jnp.zeros_like(b) for at in range(len(names))]
        rows.append(jnp.concatenate(blocks, axis=1))
    return jnp.concatenate(rows, axis=0)


def _dropped(layer: Tree, x: Float[Array, "batch time width"], place: int) -> Float[Array, "batch time width"]:
    """x with a share of its numbers set to zero and the others scaled up; x itself where no noise is given."""
    if "noise" not in layer:
        return x
    kept = 1 - layer["adapter_dropout"]
    draw = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), kept, x.shape[1:]))
    return jnp.where(draw(layer["noise"]), x / kept.astype(x.dtype), jnp.zeros((), x.dtype))


@partial(jax.jit, static_argnames="dtype")
def _merged_array(weight: Any, parts: dict[int | None, Tree], scale: Number, dtype: str) -> Array:
    """One stacked array with its adapters, a layer at a time, so that no float32 copy of all layers exists."""

    def one(layer: tuple[Any, dict[int | None, Tree]]) -> Array:
        base, own = layer
        base = dequantised(base, "float32") if is_quantised(base) else base.astype(jnp.float32)
        for place, p in own.items():
            change = jnp.matmul(p["a"], p["b"], precision="highest") * scale
            old = base if place is None else base[:, place]
            new = old + change.reshape(old.shape)
            base = new if place is None else base.at[:, place].set(new)
        return base.astype(dtype)

    return jax.lax.map(one, (weight, parts))


def merged(model: Tree, adapter: Tree, scale: Number, dtype: str | None = None) -> Tree:
    """The base with its adapter added: W + scale · A · B, computed in float32, as plain arrays.

    dtype: of the result; that of each array if not given (float32 for a quantised one).
    """
    parts: dict[str, dict[int | None, Tree]] = {}
    for name, arrays in adapter["layers"].items():
        home, place = _HOMES[name]
        parts.setdefault(home, {})[place] = arrays
    layers = dict(model["layers"])
    for home in layers:
        weight = layers[home]
        if home in parts or is_quantised(weight):
            kind = dtype or ("float32" if is_quantised(weight) else str(weight.dtype))
            layers[home] = _merged_array(weight, parts.get(home, {}), scale, kind)
        elif dtype is not None:
            layers[home] = weight.astype(dtype)
    rest = {name: x if dtype is None else x.astype(dtype) for name, x in model.items() if name != "layers"}
    return {**rest, "layers": layers}
