"""Gemma 3 with kept keys and values: prompts in chunks, then one token a row at a time.

A prompt's keys and values are kept once, whatever the number of answers to it: entry e of the prompts serves the
answers e · lanes … (e + 1) · lanes - 1, each of which has a cache of its own for what comes after the prompt. Attention
looks at both and merges the two softmaxes. Local layers keep what their window holds: the end of the prompt, and a ring
of the newest tokens of the answer.

What is kept of a prompt of n tokens are its first n - 1: its last token is the first input of decoding, in slot 0 of
each answer; slot t holds the token before the answer's t-th.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf.model.gemma3 import Architecture, Gemma3, Tree
from rlhf.model.layers import attention_mask, rms_norm
from rlhf.model.vision import image_ids

_MASKED = -2.3819763e38  # finite: a row that sees nothing gives numbers and not NaN


class LayerCache(NamedTuple):
    keys: Float[Array, "rows kv_heads slots head_width"]
    values: Float[Array, "rows kv_heads slots head_width"]


class Part(NamedTuple):
    """Keys and values to look at. With fewer rows than there are queries, neighbours share them."""

    cache: LayerCache
    is_visible: Bool[Array, "rows queries slots"]


def empty_cache(a: Architecture, rows: int, slots: int, dtype: str, has_rings: bool) -> list[LayerCache]:
    """Room for `slots` tokens in each layer; has_rings: in local layers at most for those in the window."""
    sizes = [min(a.window, slots) if has_rings and not is_global else slots for is_global in a.is_global()]
    shapes = [(rows, a.kv_heads, size, a.head_width) for size in sizes]
    return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes]


def attend_parts(
    queries: Float[Array, "batch time heads head_width"], parts: Sequence[Part]
) -> Float[Array, "batch time heads head_width"]:
    """Attention over all parts together: one softmax in float32. The queries are scaled already."""
    batch, time, heads, width = queries.shape
    kv_heads = parts[0].cache.keys.shape[1]
    grouped = (batch, time, kv_heads, heads // kv_heads)

    def apart(x, rows):  # from the batch's layout to that of a part's scores
        return x.reshape(rows, -1, *grouped[2:]).swapaxes(1, 2)

    def together(x):
        return x.swapaxes(1, 2).reshape(grouped)

    scores = []
    for (keys, _), is_visible in parts:
        own = queries.reshape(keys.shape[0], -1, *grouped[2:], width).astype(keys.dtype)
        score = jnp.einsum("rqkgh,rkth->rkqgt", own, keys, preferred_element_type=jnp.float32)
        scores.append(jnp.where(is_visible[:, None, :, None, :], score, _MASKED))
    tops = jnp.stack([together(jnp.max(score, axis=-1)) for score in scores]).max(axis=0)
    total, mixed = jnp.zeros(grouped), jnp.zeros((*grouped, width))
    for score, part in zip(scores, parts, strict=True):
        weights = jnp.exp(score - apart(tops, score.shape[0])[..., None])
        total += together(jnp.sum(weights, axis=-1))
        values = part.cache.values
        sums = jnp.einsum("rkqgt,rkth->rkqgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        mixed += sums.swapaxes(1, 2).reshape(mixed.shape)
    return (mixed / total[..., None]).reshape(queries.shape).astype(queries.dtype)


class Pictures(NamedTuple):
    """Images of prompts, as `Gemma3.embed` takes them."""

    soft_tokens: Int[Array, "batch time"]
    images: Array


def prefill(
    model: Gemma3,
    weights: Tree,
    cache: list[LayerCache],
    tokens: Int[Array, "batch time"],
    chunks: tuple[Int[Array, ""], Int[Array, ""]],
    chunk: int,
    pictures: Pictures | None = None,
) -> list[LayerCache]:
    """The cache with the keys and values of the tokens from chunks[0] on, chunks[1] times `chunk` of every row.

    There must be room for whole chunks. A prompt gives the same numbers whatever is beside or behind it. With pictures,
    whose tokens see each other in both directions, one chunk holds all.
    """
    first, n_chunks = chunks

    def run(number, cache):
        return _prefill_chunk(model, weights, cache, tokens, first + number * chunk, chunk, pictures)

    return jax.lax.fori_loop(0, n_chunks, run, cache)


def _prefill_chunk(
    model: Gemma3,
    weights: Tree,
    cache: list[LayerCache],
    tokens: Array,
    start: Any,
    chunk: int,
    pictures: Pictures | None,
) -> list[LayerCache]:
    a, (rows, time) = model.architecture, tokens.shape
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk, axis=1)
    positions = jnp.broadcast_to(start + jnp.arange(chunk)[None], (rows, chunk))
    x = model.embed(weights, cut(tokens, start), *(pictures or ()))
    ids = None
    if pictures is not None and a.vision is not None:
        ids = image_ids(pictures.soft_tokens, a.vision.tokens_per_image)

    def visible(first, n, window):
        keys = jnp.broadcast_to(first + jnp.arange(n)[None], (rows, n))
        ones = jnp.ones((rows, max(n, chunk)), jnp.int32)
        return attention_mask(positions, ones[:, :chunk], keys, ones[:, :n], window, None, ids, ids)

    # Local layers look at the part of the cache that the window can reach.
    span = min(time, a.window + chunk)
    first = jnp.clip(start + chunk - span, 0, time - span)
    looks = {False: (first, span, visible(first, span, a.window)), True: (0, time, visible(0, time, None))}
    ropes, after = model.rope(positions), []
    for layer, kept, is_global in zip(weights["model"]["layers"], cache, a.is_global(), strict=True):

        def mix(q, k, v, kept=kept, look=looks[is_global]):
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
            kept = LayerCache(
                *(put(old, new.swapaxes(1, 2).astype(old.dtype)) for old, new in zip(kept, (k, v), strict=True))
            )
            first, n, is_visible = look
            seen = LayerCache(*(jax.lax.dynamic_slice_in_dim(c, first, n, axis=2) for c in kept))
            return attend_parts(q, [Part(seen, is_visible)]), kept

        x, kept = model.block(layer, x, ropes[is_global], mix)
        after.append(kept)
    return after


def take_seat(
    model: Gemma3, seated: list[LayerCache], entry: Array, staged: list[LayerCache], place: Array, n_kept: Array
) -> list[LayerCache]:
    """Copy the prompt at `place` of a prefilled cache to `entry`; local layers get the last tokens of its `n_kept`."""
    after = []
    for old, new in zip(seated, staged, strict=True):
        size = old.keys.shape[2]
        start = jnp.clip(n_kept - size, 0, new.keys.shape[2] - size) if size < new.keys.shape[2] else 0
        part = (1, new.keys.shape[1], size, new.keys.shape[3])
        cut = [jax.lax.dynamic_slice(x, (place, 0, start, 0), part) for x in new]
        after.append(
            LayerCache(*(jax.lax.dynamic_update_slice(x, y, (entry, 0, 0, 0)) for x, y in zip(old, cut, strict=True)))
        )
    return after


def keep_answer(
    staged: list[LayerCache], answers: list[LayerCache], n_kept: Int[Array, ""], n_drawn: Int[Array, ""]
) -> list[LayerCache]:
    """The cache of a prefilled prompt with what decoding kept of the answer to it behind the prompt's n_kept tokens.

    Both have one row. Local layers get the tokens of the ring, which are all that the next token's window reaches.
    """
    after = []
    for old, new in zip(staged, answers, strict=True):
        numbers = n_drawn - 1 - (n_drawn - 1 - jnp.arange(new.keys.shape[2])) % new.keys.shape[2]
        places = jnp.where(numbers >= 0, n_kept + numbers, old.keys.shape[2])  # past the end: dropped
        put = [x.at[0, :, places].set(y[0].swapaxes(0, 1), mode="drop") for x, y in zip(old, new, strict=True)]
        after.append(LayerCache(*put))
    return after


def decode(
    model: Gemma3,
    weights: Tree,
    prompts: list[LayerCache],
    answers: list[LayerCache],
    n_kept: Int[Array, "entries"],
    tokens: Int[Array, "rows"],
    steps: Int[Array, "rows"],
) -> tuple[Float[Array, "rows width"], list[LayerCache]]:
    """Hidden state after one more token in each row, which is kept in slot `steps` of its answer.

    n_kept: tokens of each prompt in the cache. A row's token has position n_kept + steps.
    """
    a, n_rows, n_entries = model.architecture, tokens.shape[0], n_kept.shape[0]
    lanes = n_rows // n_entries
    positions = jnp.repeat(n_kept, lanes) + steps
    ropes = model.rope(positions[:, None])
    x = model.embed(weights, tokens[:, None])
    masks: dict[tuple, tuple[Array, Array]] = {}
    after: list[LayerCache] = []
    for layer, prompt, kept, is_global in zip(weights["model"]["layers"], prompts, answers, a.is_global(), strict=True):
        window = None if is_global else a.window
        sizes = prompt.keys.shape[2], kept.keys.shape[2], window
        if sizes not in masks:
            seen = _seen_of_prompts(n_kept, positions.reshape(n_entries, lanes), sizes[0], window)
            masks[sizes] = seen, _seen_of_answers(steps, sizes[1])

        def mix(q, k, v, prompt=prompt, kept=kept, masks=masks[sizes]):
            slots = steps % kept.keys.shape[2]
            kept = LayerCache(*(_put(old, new, slots) for old, new in zip(kept, (k, v), strict=True)))
            return attend_parts(q, [Part(prompt, masks[0]), Part(kept, masks[1])]), kept

        x, kept = model.block(layer, x, ropes[is_global], mix)
        after.append(kept)
    return rms_norm(x[:, 0], weights["model"]["final_norm"], a.eps), after


def _put(cache: Array, new: Float[Array, "rows one kv_heads head_width"], slots: Int[Array, "rows"]) -> Array:
    new = new.swapaxes(1, 2).astype(cache.dtype)
    return jax.vmap(lambda c, x, slot: jax.lax.dynamic_update_slice(c, x, (0, slot, 0)))(cache, new, slots)


def _seen_of_prompts(
    n_kept: Int[Array, "entries"], positions: Int[Array, "entries lanes"], slots: int, window: int | None
) -> Bool[Array, "entries lanes slots"]:
    """Slot c of a local layer holds the prompt's token max(n_kept - slots, 0) + c; of a global one all fit."""
    held = jnp.maximum(n_kept - slots, 0)[:, None] + jnp.arange(slots)[None]
    is_filled = (held < n_kept[:, None])[:, None, :]
    if window is None:
        return jnp.broadcast_to(is_filled, (*positions.shape, slots))
    return is_filled & (positions[:, :, None] - held[:, None, :] < window)


def _seen_of_answers(steps: Int[Array, "rows"], slots: int) -> Bool[Array, "rows one slots"]:
    """Of a ring, each slot that was written: it holds one of the last `slots` tokens, all inside the window."""
    back = (steps[:, None] - jnp.arange(slots)[None]) % slots
    return (steps[:, None] - back >= 0)[:, None, :]
