"""How much memory a training step will take, from shapes alone: nothing is loaded, made or run.

The update that training would run is compiled for the CPU from abstract arrays, and XLA is asked what it needs. The
types are those of the run, but for bfloat16: XLA on CPU turns much of that into float32, so float16, which is as
large and is left alone, stands in for it. What is in memory beside the update (a reference, the weights and caches of
generation) is added up from shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf.model.gemma3 import Gemma3
from rlhf.model.sharding import n_parts, spec, with_shardings
from rlhf.ops.logprobs import LOGITS
from rlhf.sampling.ahead import kept_bytes
from rlhf.sampling.programs import Setting
from rlhf.sampling.shapes import Shape
from rlhf.sampling.weights import DecodingWeights
from rlhf.train.update import eager_update, initial_optimizer

Tree = Any

# How good the machine code is does not change what memory it needs.
_QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_embed_ir_in_executable": False,
}


def stand_in(dtype: str) -> str:
    """The type to compile with in place of one: as large, and computed on a CPU as it is."""
    return "float16" if dtype == "bfloat16" else dtype


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training step as shapes.

    trainable, frozen: components of the parameters. reference: kept beside them. batch: arrays of one optimizer step.
    """

    model: Gemma3
    algorithm: Any
    trainable: Tree
    frozen: Tree
    reference: Tree
    batch: dict[str, jax.ShapeDtypeStruct]
    mesh: Any = None

    def with_microbatch(self, rows: int) -> "Setup":
        return dataclasses.replace(self, algorithm=dataclasses.replace(self.algorithm, microbatch_size=rows))

    def with_remat(self, remat: str) -> "Setup":
        return dataclasses.replace(self, model=dataclasses.replace(self.model, remat=remat))


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one device.

    parts: what is there all the time, by name. gradients: the largest they are. working: what the update needs
    besides (activations, one chunk of logits among them). generation: what answering needs besides `parts`.
    """

    parts: dict[str, int]
    gradients: int
    working: int
    generation: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def update_peak(self) -> int:
        return sum(self.parts.values()) + self.gradients + self.working

    @property
    def generation_peak(self) -> int:
        return sum(self.parts.values()) + sum(self.generation.values()) if self.generation else 0

    @property
    def peak(self) -> int:
        return max(self.update_peak, self.generation_peak)


def n_bytes(tree: Tree, mesh: Any = None) -> int:
    """Of all arrays of a tree, on one device of a mesh."""

    def of(path: Any, x: Any) -> int:
        shape = x.shape
        split = 1 if mesh is None else math.prod(n_parts(axes, mesh) for axes in spec(path, shape, mesh))
        return math.prod(shape) * x.dtype.itemsize // split

    return sum(of(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree))


def need_of(setup: Setup) -> Need:
    """What one device needs for an optimizer step: compiles it, which takes seconds."""
    optimizer = jax.eval_shape(functools.partial(initial_optimizer, setup.algorithm), setup.trainable)
    state = {
        "params": setup.trainable,
        "optimizer": optimizer,
        "n_updates": jax.ShapeDtypeStruct((), jnp.int32),
        "n_skipped": jax.ShapeDtypeStruct((), jnp.int32),
    }
    inputs, mesh = (state, setup.frozen, setup.batch), setup.mesh
    if mesh is not None:
        inputs = (*(with_shardings(tree, mesh) for tree in inputs[:2]), _rows_spread(setup.batch, mesh))
    run = jax.jit(functools.partial(eager_update, model=setup.model, mesh=mesh), donate_argnums=0)
    numbers = jax.tree.map(lambda x: jnp.float32(x) if isinstance(x, int | float) else x, setup.algorithm)
    lowered = run.lower(*inputs, numbers, jax.ShapeDtypeStruct((), jnp.int32))
    try:
        compiled = lowered.compile(compiler_options=_QUICK)
    except jax.errors.JaxRuntimeError:  # options come and go; without them it only takes longer
        compiled = lowered.compile()
    found: Any = compiled.memory_analysis()
    gradients = n_bytes(setup.trainable, mesh)
    parts = {
        "trained weights": gradients,
        "frozen weights": n_bytes(setup.frozen, mesh),
        "optimizer": n_bytes(optimizer, mesh),
        "reference": n_bytes(setup.reference, mesh),
    }
    known = parts["trained weights"] + parts["frozen weights"] + parts["optimizer"]
    parts["batch"] = max(0, found.argument_size_in_bytes - known)
    working = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Need(parts, min(gradients, working), max(0, working - gradients))


def _rows_spread(batch: dict[str, Any], mesh: Any) -> dict[str, Any]:
    from jax.sharding import NamedSharding, PartitionSpec

    def of(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = PartitionSpec(("data", "fsdp")) if x.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, where))

    return {name: of(x) for name, x in batch.items()}


def generation_of(setup: Setup, shape: Shape, weights: Any, cache_dtype: str | None) -> dict[str, int]:
    """What one device needs for answering, besides the parameters: weights in their own layout, keys and values, and
    logits of the rows with what is drawn from them (three arrays of them, in float32)."""
    decoding = DecodingWeights(setup.model, weights)
    model = {**setup.frozen, **setup.trainable}["model"]
    layers = jax.eval_shape(decoding.layers_of, model)
    embedding = model["embedding"]
    is_copied = embedding.dtype != jnp.dtype(stand_in(decoding.model.compute_dtype))
    copy = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(layers))
    copy += is_copied * embedding.size * jnp.dtype(decoding.model.compute_dtype).itemsize
    cache = kept_bytes(Setting(decoding.model, cache_dtype or decoding.model.compute_dtype, None), shape)
    n_weights = 1 if setup.mesh is None else setup.mesh.shape["fsdp"] * setup.mesh.shape["tensor"]
    n_all = 1 if setup.mesh is None else setup.mesh.size
    logits = 3 * 4 * shape.rows * setup.model.architecture.vocab_size
    return {"decoding weights": copy // n_weights, "keys and values": cache // n_all, "drawing": logits // n_all}


def flops_of(setup: Setup, n_tokens: int, n_time: int) -> float:
    """Floating point operations of the products of one optimizer step, over all devices.

    Two for each weight and token forward, two for the gradient of inputs, two for that of trained weights, and two more
    where the forward pass is run again; attention over the keys that a query sees on average.
    """
    a = setup.model.architecture
    n_matrix = sum(math.prod(shape) for shape in a.shapes()["layers"].values()) + a.vocab_size * a.width
    is_full = "model" in setup.trainable
    per_weight = 2 + 2 + 2 * is_full + 2 * (setup.model.remat == "block")
    seen = [(n_time / 2 if g else min(a.window, n_time / 2)) for g in a.is_global()]
    attention = 4 * a.heads * a.head_width * sum(seen) * (3 + (setup.model.remat == "block"))
    return n_tokens * (per_weight * n_matrix + attention)


def traffic_of(setup: Setup, need: Need, n_microbatches: int) -> float:
    """Bytes that one device reads and writes in an optimizer step, at least: weights once forward, once backward and
    once more where the forward pass is run again, for each microbatch; gradients and optimizer state read and written
    once; activations and logits written and read once."""
    passes = 2 + (setup.model.remat == "block")
    weights = need.parts["trained weights"] + need.parts["frozen weights"]
    state = need.parts["trained weights"] + need.parts["optimizer"] + need.gradients
    return n_microbatches * (passes * weights + 2 * need.working) + 2 * state


def logits_bytes(setup: Setup, n_tokens: int) -> int:
    """The chunk of logits that is in memory at once."""
    return 4 * min(LOGITS, n_tokens * setup.model.architecture.vocab_size)


def largest_microbatch(setup: Setup, limit: float, divisors: list[int], need: Callable[[Setup], Need]) -> int | None:
    """The largest number of rows at once whose peak is within `limit` bytes; None where not even the smallest is.

    divisors: what is tried, rising; the last is all rows. That is a case of its own, since no sum of gradients is kept
    beside them. Below it memory grows linearly with rows, so two compilations tell.
    """
    if need(setup.with_microbatch(divisors[-1])).peak <= limit:
        return divisors[-1]
    if len(divisors) == 1:
        return None
    small, *others = divisors[:-1]
    low = need(setup.with_microbatch(small)).peak
    if low > limit:
        return None
    if not others:
        return small
    slope = (need(setup.with_microbatch(others[0])).peak - low) / (others[0] - small)
    return max(n for n in (small, *others) if low + slope * (n - small) <= limit)
