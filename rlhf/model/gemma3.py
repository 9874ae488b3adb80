"""Gemma 3 as pure functions over a tree of stacked arrays: every size is the same code with other numbers.

The parameters are a plain tree whose layer arrays have a leading axis `layers`; the layers run as one scan with
local or global attention as data, so tracing and compiling cost the same for 6 and for 62 of them. Facts of the
architecture: Gemma 3 Technical Report (Gemma Team, 2025), section 2.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf.config import Number
from rlhf.model.attention import Places, choose
from rlhf.model.kernels import mixer
from rlhf.model.layers import gated_mlp, project, project_attention, rms_norm, rope_tables, rotate
from rlhf.model.lora import KEPT_PRODUCTS, adapt, compute_layer, stacked_layers
from rlhf.model.parts import each_layer, looked_up
from rlhf.model.random_arrays import normal
from rlhf.model.vision import Vision, image_ids, pictures_of, soft_features
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
    vision: Vision | None = None

    @property
    def tower(self) -> Vision:
        """`vision` of an architecture that has it."""
        assert self.vision is not None, "images for a model that reads text only"
        return self.vision

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


@dataclasses.dataclass(frozen=True)
class Gemma3:
    """The model: an architecture and how to run it. Hashable, so that it is a static argument of compiled functions.

    compute_dtype: type of activations and of the weights as they are used; norms, softmax, logits and log-probabilities
        are float32 in any case.
    remat: what a block keeps for its backward pass, which computes the rest again: `none` the results of its matrix
        products, `block` only its input.
    scan_layers: one compiled block for all layers (fast to compile), or one for each.
    joint_attention: queries, keys and values are one matrix product; false where heads are split over devices.
    attention, mesh: what computes the attention over whole rows (`rlhf.model.kernels`), and the devices that it needs
        to know of where there are several.
    """

    architecture: Architecture
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    joint_attention: bool = True
    attention: str = "xla"
    mesh: Any = None

    def initialise(self, seed: int, dtype: str = "float32") -> Tree:
        """Random parameters, on the host: matrices N(0, 1 / fan-in), embedding N(0, 1 / width), norm weights 0."""
        a = self.architecture
        fan_in = {"out": a.heads * a.head_width, "down": a.ff_width}  # the others read the residual stream

        def draw(path, leaf):
            name = path[-1].key
            if name.endswith("norm"):
                return np.zeros(leaf.shape, leaf.dtype)
            return normal(seed, name, leaf.shape, fan_in.get(name, a.width) ** -0.5, dtype)

        return jax.tree_util.tree_map_with_path(draw, self.abstract(dtype))

    def abstract(self, dtype: str = "float32") -> Tree:
        """Shapes and types of the parameters, without memory."""
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
            self.architecture.shapes(),
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def n_parameters(self) -> int:
        """Of all components."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract_components()))

    def abstract_components(self, dtype: str = "float32") -> Tree:
        """`abstract` of every component by name: `model`, and `vision` where the architecture has it."""
        vision = self.architecture.vision
        tower = {} if vision is None else {"vision": vision.abstract(self.architecture.width, dtype)}
        return {"model": self.abstract(dtype), **tower}

    def initialise_components(self, seed: int, dtype: str = "float32") -> Tree:
        """`initialise` of every component by name."""
        vision, width = self.architecture.vision, self.architecture.width
        tower = {} if vision is None else {"vision": vision.initialise(width, seed, dtype)}
        return {"model": self.initialise(seed, dtype), **tower}

    def embed(
        self,
        params: Tree,
        tokens: Int[Array, "batch time"],
        soft_tokens: Int[Array, "batch time"] | None = None,
        images: Array | None = None,
    ) -> Float[Array, "batch time width"]:
        """Token vectors, multiplied by sqrt(width); where `soft_tokens` is not 0, those of images, which are not.

        images: [rows, slots, size, size, 3] (`rlhf.model.vision.soft_features`); each row of them serves batch / rows
            neighbours, such as both answers to one prompt, and runs through the tower once.
        soft_tokens: 1 + slot · tokens_per_image + j for the j-th soft token of a slot, 0 for text.
        """
        return self._with_pictures(params, params["model"]["embedding"][tokens], soft_tokens, images)

    def _with_pictures(self, params: Tree, found: Array, soft_tokens: Array | None, images: Array | None) -> Array:
        """`embed`, from rows of the embedding."""
        vectors = found.astype(self.compute_dtype) * jnp.asarray(self.architecture.width**0.5, self.compute_dtype)
        if soft_tokens is None or images is None:
            return vectors
        features = soft_features(params["vision"], images, self.architecture.tower, self.compute_dtype)
        features = jnp.repeat(features, found.shape[0] // features.shape[0], axis=0)
        there = jnp.take_along_axis(features, jnp.maximum(soft_tokens - 1, 0)[:, :, None], axis=1)
        return jnp.where((soft_tokens > 0)[:, :, None], there, vectors)

    def block(
        self, layer: Tree, x: Float[Array, "batch time width"], rope: tuple[Array, Array], mix: Callable
    ) -> tuple[Float[Array, "batch time width"], Any]:
        """One layer. `mix(queries, keys, values) -> (mixed, kept)` is the attention, with or without a cache."""
        a = self.architecture
        layer = compute_layer(layer, self.compute_dtype)
        add = adapt(layer)
        normed = rms_norm(x, layer["attention_norm"], a.eps)
        queries, keys, values = project_attention(normed, layer["query"], layer["key_value"], self.joint_attention)
        queries, keys, values = add(normed, q=queries, k=keys, v=values)
        queries = rotate(rms_norm(queries, layer["query_norm"], a.eps), *rope) * a.query_scale
        keys = rotate(rms_norm(keys, layer["key_norm"], a.eps), *rope)
        mixed, kept = mix(queries, keys, values)
        mixed = mixed.reshape(*x.shape[:2], -1)
        attended = add(mixed, o=project(mixed, layer["out"].reshape(-1, a.width)))
        x = x + rms_norm(attended, layer["post_attention_norm"], a.eps)
        fed = gated_mlp(rms_norm(x, layer["mlp_norm"], a.eps), layer["gate_up"], layer["down"], add)
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
        soft_tokens: Int[Array, "batch time"] | None = None,
        images: Array | None = None,
    ) -> Float[Array, "batch time width"]:
        """Hidden states after the final norm. Segment 0 is padding; tokens see their own segment and its prefix.

        soft_tokens, images: as for `embed`.
        """
        return self._run(params, tokens, segments, positions, prefixes, soft_tokens, images)[0]

    def _run(
        self,
        params: Tree,
        tokens: Array,
        segments: Array,
        positions: Array,
        prefixes: Array | None,
        soft_tokens: Array | None,
        images: Array | None,
    ) -> tuple[Array, Array]:
        """`hidden`, and the embedding to score tokens with (see `looked_up`)."""
        a = self.architecture
        local_rope, global_rope = self.rope(positions)
        seen = None if soft_tokens is None else image_ids(soft_tokens, a.tower.tokens_per_image)
        n_image = 0 if a.vision is None else a.vision.tokens_per_image
        mix = mixer(self.attention, Places(positions, segments, prefixes, seen, n_image), a.window, self.mesh)

        def run(x, layer, is_global):
            rope = choose(is_global, global_rope, local_rope)
            return self.block(layer, x, rope, lambda q, k, v: (mix(q, k, v, is_global), None))[0]

        keep = KEPT_PRODUCTS if self.remat == "none" else None
        run = jax.checkpoint(run, policy=keep, static_argnums=() if self.scan_layers else (2,))
        found, embedding = looked_up(params["model"]["embedding"], tokens)
        x = self._with_pictures(params, found, soft_tokens, images)
        stacked = stacked_layers(params, x.shape[0])
        if self.scan_layers:
            x, _ = jax.lax.scan(lambda x, layer: (run(x, *layer), None), x, (stacked, jnp.asarray(a.is_global())))
        else:
            for layer, is_global in zip(each_layer(stacked), a.is_global(), strict=True):
                x = run(x, layer, is_global)
        return rms_norm(x, params["model"]["final_norm"], a.eps), embedding

    def hidden_of(self, params: Tree, batch: Tree) -> Float[Array, "rows time width"]:
        """`hidden` of a batch (see `token_logprobs`); its leading axes are one, and `joint_…` is not read."""
        tokens, segments, positions = (jnp.asarray(batch[k]) for k in ("tokens", "segments", "positions"))
        tokens, segments, positions = (x.reshape(-1, x.shape[-1]) for x in (tokens, segments, positions))
        return self.hidden(params, tokens, segments, positions, None, *pictures_of(batch, "soft_tokens"))

    def joint_hidden_of(self, params: Tree, batch: Tree) -> Float[Array, "rows joint width"]:
        """`hidden` of the rows of a batch that hold a shared beginning once (see `rlhf.data.joint`)."""
        parts = (jnp.asarray(batch[f"joint_{name}"]) for name in ("tokens", "segments", "positions", "prefixes"))
        tokens, segments, positions, prefixes = parts
        return self.hidden(params, tokens, segments, positions, prefixes, *pictures_of(batch, "joint_soft_tokens"))

    def _scored(self, params: Tree, batch: Tree, temperature: Number, score: Callable) -> Any:
        """Score every token but the first of each segment; the others get 0."""
        if "scored" in batch:
            return self._scored_there(params, batch, temperature, score)
        if "joint_tokens" in batch:
            return self._scored_jointly(params, batch, temperature, score)
        hidden = self.hidden_of(params, batch)[:, :-1]
        shape = batch["tokens"].shape
        tokens, segments = (jnp.asarray(batch[name]).reshape(-1, shape[-1]) for name in ("tokens", "segments"))
        embedding = params["model"]["embedding"].astype(self.compute_dtype)
        scores = score(hidden.reshape(-1, hidden.shape[-1]), embedding, tokens[:, 1:].reshape(-1), temperature)
        follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)

        def spread(values):
            values = jnp.where(follows, values.reshape(follows.shape), 0.0)
            return jnp.pad(values, ((0, 0), (1, 0))).reshape(shape)

        return jax.tree.map(spread, scores)

    def _scored_there(self, params: Tree, batch: Tree, temperature: Number, score: Callable) -> Any:
        """The same numbers at the places `scored` alone, so that prompts cost no scores; 0 elsewhere."""
        tokens, places = jnp.asarray(batch["tokens"]), jnp.asarray(batch["scored"])
        targets = jnp.take_along_axis(tokens, places, axis=-1).reshape(-1)
        hidden, before = self._hidden_before(params, batch, places)
        before = jnp.take_along_axis(hidden, jnp.maximum(before, 0)[:, :, None], axis=1)
        embedding = params["model"]["embedding"].astype(self.compute_dtype)
        scores = score(before.reshape(-1, hidden.shape[-1]), embedding, targets, temperature)
        at = places.reshape(-1, places.shape[-1])
        rows = jnp.arange(len(at))[:, None]

        def spread(values):
            values = jnp.where(at > 0, values.reshape(at.shape), 0.0)
            blank = jnp.zeros((len(at), tokens.shape[-1]), values.dtype)
            return blank.at[rows, at].add(values).reshape(tokens.shape)

        return jax.tree.map(spread, scores)

    def _hidden_before(self, params: Tree, batch: Tree, places: Array) -> tuple[Array, Array]:
        """Hidden states [rows, …, width], and where in its row the one is that predicts each of `places`."""
        if "joint_tokens" not in batch:
            hidden = self.hidden_of(params, batch)
            return hidden, places.reshape(len(hidden), -1) - 1
        hidden = self.joint_hidden_of(params, batch)
        there = jnp.take_along_axis(jnp.asarray(batch["joint_places"]), places, axis=-1).reshape(len(hidden), -1)
        return hidden, jnp.take_along_axis(jnp.asarray(batch["joint_previous"]), jnp.maximum(there, 0), axis=1)

    def _scored_jointly(self, params: Tree, batch: Tree, temperature: Number, score: Callable) -> Any:
        """The same numbers from rows in which sequences that begin alike share their beginning."""
        tokens = jnp.asarray(batch["joint_tokens"])
        previous, places = jnp.asarray(batch["joint_previous"]), jnp.asarray(batch["joint_places"])
        hidden = self.joint_hidden_of(params, batch)
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
            With `scored` [..., n] only the tokens at these places (from 1; 0 fills up) are scored, all others have 0.
            With images also `images` [rows, slots, size, size, 3] and `soft_tokens` [..., time], as for `embed`.
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
        soft_tokens: Int[Array, "batch time"] | None = None,
        images: Array | None = None,
    ) -> Float[Array, "batch time vocab"]:
        """Logits of every position, in float32: for looking and for tests; training never makes them all."""
        hidden = self.hidden(params, tokens, segments, positions, None, soft_tokens, images)
        return self.unembed(params, hidden)

    def unembed(self, params: Tree, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows vocab"]:
        embedding = params["model"]["embedding"].astype(self.compute_dtype)
        return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
