"""Gemma 3 as pure functions over a tree of stacked arrays: every size is the same code with other numbers.

The parameters are a plain tree whose layer arrays have a leading axis `layers`; the layers run as one scan with
local or global attention as data, so tracing and compiling cost the same for 6 and for 62 of them. Facts of the
architecture: Gemma 3 Technical Report (Gemma Team, 2025), section 2.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf.config import Number
from rlhf.model.layers import attend, attention_mask, gated_mlp, project, rms_norm, rope_tables, rotate
from rlhf.ops.logprobs import TokenStatistics, target_logprobs, target_statistics

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The numbers that make a Gemma 3.

    query_scale: queries are multiplied by it. window: tokens that a local layer sees, the query included.
    pattern: every pattern-th layer is global. rope_scale: positions of global layers are divided by it.
    """

    vocab_size: int
    width: int
    ff_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    query_scale: float
    window: int
    pattern: int = 6
    rope_base_local: float = 10_000.0
    rope_base_global: float = 1_000_000.0
    rope_scale: float = 1.0
    eps: float = 1e-6

    def is_global(self) -> tuple[bool, ...]:
        """For each layer whether it sees the whole sequence."""
        return tuple(i % self.pattern == self.pattern - 1 for i in range(self.layers))

    def shapes(self) -> Tree:
        """Shape of every parameter; the tree is the tree of the parameters."""
        d, f, h, q, k = self.width, self.ff_width, self.head_width, self.heads, self.kv_heads
        layer = {
            "attention_norm": (d,),
            "query": (d, q, h),
            "key_value": (d, 2, k, h),
            "query_norm": (h,),
            "key_norm": (h,),
            "out": (q, h, d),
            "post_attention_norm": (d,),
            "mlp_norm": (d,),
            "gate_up": (d, 2, f),
            "down": (f, d),
            "post_mlp_norm": (d,),
        }
        stacked = {name: (self.layers, *shape) for name, shape in layer.items()}
        return {"embedding": (self.vocab_size, d), "layers": stacked, "final_norm": (d,)}


@jax.custom_vjp
def _unstack(stacked: Tree) -> list[Tree]:
    n_layers = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n_layers)]


# The gradient of n slices would be n full-sized arrays added up; stacking the parts writes each once.
_unstack.defvjp(
    lambda stacked: (_unstack(stacked), None),
    lambda _, parts: (jax.tree.map(lambda *xs: jnp.stack(xs), *parts),),
)


@dataclasses.dataclass(frozen=True)
class Gemma3:
    """The model: an architecture and how to run it. Hashable, so that it is a static argument of compiled functions.

    compute_dtype: type of activations and of the weights as they are used; norms, softmax, logits and log-probabilities
        are float32 in any case.
    remat: what a block keeps for its backward pass, which computes the rest again: `none` the results of its matrix
        products, `block` only its input.
    scan_layers: one compiled block for all layers (fast to compile), or one for each.
    """

    architecture: Architecture
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True

    def initialise(self, key: Array, dtype: str = "float32") -> Tree:
        """Random parameters: matrices N(0, 1 / fan-in), embedding N(0, 1 / width), norm weights 0."""
        fan_in = {
            "query": self.architecture.width,
            "key_value": self.architecture.width,
            "gate_up": self.architecture.width,
        }
        fan_in |= {"out": self.architecture.heads * self.architecture.head_width, "down": self.architecture.ff_width}
        leaves, structure = jax.tree_util.tree_flatten_with_path(
            self.architecture.shapes(), is_leaf=lambda x: isinstance(x, tuple)
        )
        keys = jax.random.split(key, len(leaves))

        def draw(path, shape, leaf_key):
            name = path[-1].key
            if name.endswith("norm"):
                return jnp.zeros(shape, dtype)
            deviation = fan_in.get(name, self.architecture.width) ** -0.5
            return (jax.random.normal(leaf_key, shape) * deviation).astype(dtype)

        return jax.tree.unflatten(structure, [draw(p, s, k) for (p, s), k in zip(leaves, keys, strict=True)])

    def abstract(self, dtype: str = "float32") -> Tree:
        """Shapes and types of the parameters, without memory."""
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
            self.architecture.shapes(),
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def n_parameters(self) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract()))

    def embed(self, params: Tree, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time width"]:
        """Token vectors, multiplied by sqrt(width)."""
        vectors = params["model"]["embedding"][tokens].astype(self.compute_dtype)
        return vectors * jnp.asarray(self.architecture.width**0.5, self.compute_dtype)

    def block(
        self, layer: Tree, x: Float[Array, "batch time width"], rope: tuple[Array, Array], mix: Callable
    ) -> tuple[Float[Array, "batch time width"], Any]:
        """One layer. `mix(queries, keys, values) -> (mixed, kept)` is the attention, with or without a cache."""
        a = self.architecture
        layer = jax.tree.map(lambda w: w.astype(self.compute_dtype), layer)
        normed = rms_norm(x, layer["attention_norm"], a.eps)
        queries = project(normed, layer["query"])
        keys, values = (project(normed, layer["key_value"][:, i]) for i in (0, 1))
        queries = rotate(rms_norm(queries, layer["query_norm"], a.eps), *rope) * a.query_scale
        keys = rotate(rms_norm(keys, layer["key_norm"], a.eps), *rope)
        mixed, kept = mix(queries, keys, values)
        attended = project(mixed.reshape(*x.shape[:2], -1), layer["out"].reshape(-1, a.width))
        x = x + rms_norm(attended, layer["post_attention_norm"], a.eps)
        fed = gated_mlp(rms_norm(x, layer["mlp_norm"], a.eps), layer["gate_up"], layer["down"])
        return x + rms_norm(fed, layer["post_mlp_norm"], a.eps), kept

    def rope(self, positions: Int[Array, "batch time"]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Sine and cosine for local and for global layers."""
        a = self.architecture
        local = rope_tables(positions, a.head_width, a.rope_base_local, 1.0)
        return local, rope_tables(positions, a.head_width, a.rope_base_global, a.rope_scale)

    def hidden(
        self,
        params: Tree,
        tokens: Int[Array, "batch time"],
        segments: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        prefixes: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Hidden states after the final norm. Segment 0 is padding; tokens see their own segment and its prefix."""
        a = self.architecture
        local_rope, global_rope = self.rope(positions)
        local_mask = attention_mask(positions, segments, positions, segments, a.window, prefixes)
        global_mask = attention_mask(positions, segments, positions, segments, None, prefixes)

        def run(x, layer, is_global):
            rope, mask = _choose(is_global, (global_rope, global_mask), (local_rope, local_mask))
            return self.block(layer, x, rope, lambda q, k, v: (attend(q, k, v, mask), None))[0]

        keep = jax.checkpoint_policies.checkpoint_dots if self.remat == "none" else None
        run = jax.checkpoint(run, policy=keep, static_argnums=() if self.scan_layers else (2,))
        x = self.embed(params, tokens)
        stacked = params["model"]["layers"]
        if self.scan_layers:
            x, _ = jax.lax.scan(lambda x, layer: (run(x, *layer), None), x, (stacked, jnp.asarray(a.is_global())))
        else:
            for layer, is_global in zip(_unstack(stacked), a.is_global(), strict=True):
                x = run(x, layer, is_global)
        return rms_norm(x, params["model"]["final_norm"], a.eps)

    def _scored(self, params: Tree, batch: Tree, temperature: Number, score: Callable) -> Any:
        """Score every token but the first of each segment; the others get 0."""
        if "joint_tokens" in batch:
            return self._scored_jointly(params, batch, temperature, score)
        tokens, segments, positions = (batch[k] for k in ("tokens", "segments", "positions"))
        shape = tokens.shape
        tokens, segments, positions = (jnp.asarray(x).reshape(-1, shape[-1]) for x in (tokens, segments, positions))
        hidden = self.hidden(params, tokens, segments, positions)[:, :-1]
        embedding = params["model"]["embedding"].astype(self.compute_dtype)
        scores = score(hidden.reshape(-1, hidden.shape[-1]), embedding, tokens[:, 1:].reshape(-1), temperature)
        follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)

        def spread(values):
            values = jnp.where(follows, values.reshape(follows.shape), 0.0)
            return jnp.pad(values, ((0, 0), (1, 0))).reshape(shape)

        return jax.tree.map(spread, scores)

    def _scored_jointly(self, params: Tree, batch: Tree, temperature: Number, score: Callable) -> Any:
        """The same numbers from rows in which sequences that begin alike share their beginning."""
        parts = (jnp.asarray(batch[f"joint_{name}"]) for name in ("tokens", "segments", "positions", "prefixes"))
        tokens, segments, positions, prefixes = parts
        previous, places = jnp.asarray(batch["joint_previous"]), jnp.asarray(batch["joint_places"])
        hidden = self.hidden(params, tokens, segments, positions, prefixes)
        before = jnp.take_along_axis(hidden, jnp.maximum(previous, 0)[:, :, None], axis=1)
        embedding = params["model"]["embedding"].astype(self.compute_dtype)
        scores = score(before.reshape(-1, hidden.shape[-1]), embedding, tokens.reshape(-1), temperature)

        def spread(values):
            values = jnp.where(previous >= 0, values.reshape(tokens.shape), 0.0)
            found = jnp.take_along_axis(values, jnp.maximum(places, 0).reshape(places.shape[0], -1), axis=1)
            return jnp.where(places >= 0, found.reshape(places.shape), 0.0)

        return jax.tree.map(spread, scores)

    def token_logprobs(self, params: Tree, batch: Tree, temperature: Number = 1.0) -> Float[Array, "*rows time"]:
        """Log-probability (nats) of each token given those before it in its segment.

        batch: `tokens`, `segments`, `positions`, each [..., time]; with `joint_…` (see `rlhf.data.joint`) the same is
            computed from rows that hold a shared beginning once. 0 for the first token of a segment and for padding.
        """
        return self._scored(params, batch, temperature, target_logprobs)

    def token_statistics(self, params: Tree, batch: Tree, temperature: Number = 1.0) -> TokenStatistics:
        """`token_logprobs` with entropy and log-collision of each predicting distribution, all [..., time]."""
        return self._scored(params, batch, temperature, target_statistics)

    def logits(
        self,
        params: Tree,
        tokens: Int[Array, "batch time"],
        segments: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
    ) -> Float[Array, "batch time vocab"]:
        """Logits of every position, in float32: for looking and for tests; training never makes them all."""
        hidden = self.hidden(params, tokens, segments, positions)
        return self.unembed(params, hidden)

    def unembed(self, params: Tree, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows vocab"]:
        embedding = params["model"]["embedding"].astype(self.compute_dtype)
        return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


def _choose(condition: bool | Array, yes: Any, no: Any) -> Any:
    """`yes` or `no`: decided while tracing where the condition is known, by a select where it is data."""
    if isinstance(condition, bool):
        return yes if condition else no
    return jax.tree.map(partial(jnp.where, condition), yes, no)
