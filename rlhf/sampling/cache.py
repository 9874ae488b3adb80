"""Gemma 3 with kept keys and values: a whole batch of prompts at once, then one token a row at a time.

Every row has `prompt` slots, filled from the left, then one slot for each new token; slot `prompt + t` holds the t-th
new token of every row, whatever the length of its prompt. Positions say what a query may see, so the unfilled slots
between a short prompt and its answer, and those of tokens still to come, are never seen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.model.layers import attend, attention_mask, rms_norm


class Slots(NamedTuple):
    """Where the cached tokens are. positions: of each slot in its row. is_used: not the empty end of a prompt."""

    positions: Int[Array, "batch slots"]
    is_used: Bool[Array, "batch slots"]


class LayerCache(NamedTuple):
    keys: Float[Array, "batch slots kv_heads head_width"]
    values: Float[Array, "batch slots kv_heads head_width"]


def slots_of(lengths: Int[Array, "batch"], n_prompt: int, n_new: int) -> Slots:
    """The slots of rows whose prompts have `lengths` tokens."""
    index = jnp.arange(n_prompt + n_new)[None, :]
    is_new = index >= n_prompt
    positions = jnp.where(is_new, lengths[:, None] + index - n_prompt, index)
    return Slots(positions, is_new | (index < lengths[:, None]))


def prefill(
    model: Gemma3, params: Tree, tokens: Int[Array, "batch prompt"], lengths: Int[Array, "batch"], n_new: int
) -> tuple[Float[Array, "batch width"], list[LayerCache]]:
    """Hidden state of each prompt's last token, and the keys and values of all layers with room for `n_new` more."""
    a = model.architecture
    positions, is_used = slots_of(lengths, tokens.shape[1], 0)
    segments = is_used.astype(jnp.int32)
    masks = [attention_mask(positions, segments, positions, segments, window) for window in (a.window, None)]
    local, everything = zip(model.rope(positions), masks, strict=True)

    def run(x, layer_and_kind):
        layer, is_global = layer_and_kind
        rope, mask = jax.tree.map(lambda yes, no: jnp.where(is_global, yes, no), everything, local)
        return model.block(layer, x, rope, lambda q, k, v: (attend(q, k, v, mask), LayerCache(k, v)))

    x, kept = jax.lax.scan(run, model.embed(params, tokens), (params["model"]["layers"], jnp.asarray(a.is_global())))
    kept = jax.tree.map(lambda c: jnp.pad(c, ((0, 0), (0, 0), (0, n_new), (0, 0), (0, 0))), kept)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    cache = [jax.tree.map(lambda c, i=i: c[i], kept) for i in range(a.layers)]
    return rms_norm(last, params["model"]["final_norm"], a.eps), cache


def decoding_params(model: Gemma3, params: Tree) -> Tree:
    """The parameters as decoding reads them: a tree for each layer, in the compute type.

    Made once, outside the loop over tokens: a slice of the stacked weights inside it would copy them for every token.
    """
    stacked = jax.tree.map(lambda x: x.astype(model.compute_dtype), params["model"]["layers"])
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(model.architecture.layers)]
    embedding = params["model"]["embedding"].astype(model.compute_dtype)
    return {"model": {**params["model"], "embedding": embedding, "layers": layers}}


def decode(
    model: Gemma3,
    params: Tree,
    cache: list[LayerCache],
    slots: Slots,
    tokens: Int[Array, "batch"],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "batch width"], list[LayerCache]]:
    """Hidden state after one more token in each row, which is kept in `slot`. params: from `decoding_params`."""
    a = model.architecture
    positions = jax.lax.dynamic_slice_in_dim(slots.positions, slot, 1, axis=1)
    ones = jnp.ones_like(positions)
    used = slots.is_used.astype(jnp.int32)
    masks = [attention_mask(positions, ones, slots.positions, used, window) for window in (a.window, None)]
    ropes = model.rope(positions)
    x = model.embed(params, tokens[:, None])
    after: list[Any] = []
    for layer, kept, is_global in zip(params["model"]["layers"], cache, a.is_global(), strict=True):

        def mix(q, k, v, kept=kept, mask=masks[is_global]):
            put = jax.lax.dynamic_update_slice_in_dim
            kept = LayerCache(put(kept.keys, k, slot, axis=1), put(kept.values, v, slot, axis=1))
            return attend(q, kept.keys, kept.values, mask), kept

        x, kept = model.block(layer, x, ropes[is_global], mix)
        after.append(kept)
    return rms_norm(x[:, 0], params["model"]["final_norm"], a.eps), after
