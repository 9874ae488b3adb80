"""The exact bounds of top-k and top-p over a whole vocabulary, by bisection: counts and sums instead of a sort."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf.sampling.methods import Numbers


class Bounds(NamedTuple):
    """What is kept of each row: tokens with a rank value above `least`, and of those that equal it the ids below `end`.

    least: as `order` gives it.
    """

    least: Int[Array, "rows"]
    end: Int[Array, "rows"]


def order(logits: Float[Array, "*rows"]) -> Int[Array, "*rows"]:
    """Integers in the order of the floats that they stand for."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def is_kept(
    logits: Float[Array, "rows tokens"], ids: Int[Array, "#rows tokens"], bounds: Bounds
) -> Bool[Array, "rows tokens"]:
    """Whether tokens with these logits and ids are inside the bounds."""
    ranks, least = order(logits), bounds.least[:, None]
    return (ranks > least) | ((ranks == least) & (ids < bounds.end[:, None]))


def everything(logits: Float[Array, "rows vocab"]) -> Bounds:
    """Bounds that keep all."""
    rows, vocab = logits.shape
    return Bounds(jnp.full(rows, jnp.iinfo(jnp.int32).min), jnp.full(rows, vocab))


def search_bounds(numbers: Numbers, logits: Float[Array, "rows vocab"], tops: Float[Array, "rows"]) -> Bounds:
    """The bounds of top-k, then of top-p within what it left. tops: the largest logit of each row.

    Each halving reads the logits once: about 80 passes, whatever k and the size of the vocabulary.
    """
    rows, vocab = logits.shape
    ids = jnp.arange(vocab)[None]
    ranks, above = order(logits), order(tops) + 1
    lowest = jnp.full(rows, order(jnp.float32(-jnp.inf)))
    has_top_k = (numbers.top_k > 0) & (numbers.top_k < vocab)
    wanted = jnp.where(has_top_k, numbers.top_k, vocab).astype(jnp.int32)

    least = _greatest(lambda rank: jnp.sum(ranks >= rank[:, None], axis=-1) >= wanted, lowest, above)
    n_ties = wanted - jnp.sum(ranks > least[:, None], axis=-1)
    best = Bounds(least, _end_of_ties(ranks, least, n_ties))

    temperature = jnp.where(numbers.temperature == 0, 1.0, numbers.temperature)[:, None]
    weights = jnp.where(is_kept(logits, ids, best), jnp.exp((logits - tops[:, None]) / temperature), 0.0)
    aim = numbers.top_p * jnp.sum(weights, axis=-1)

    def weight_from(rank):
        return jnp.sum(jnp.where(ranks >= rank[:, None], weights, 0.0), axis=-1)

    least = _greatest(lambda rank: weight_from(rank) >= aim, lowest, above)
    one = jnp.max(jnp.where(ranks == least[:, None], weights, 0.0), axis=-1)
    missing = jnp.ceil((aim - weight_from(least + 1)) / jnp.maximum(one, 1e-37))
    n_ties = jnp.clip(missing, 1, vocab).astype(jnp.int32)
    end = _end_of_ties(ranks, least, n_ties)
    end = jnp.where(least == best.least, jnp.minimum(end, best.end), end)
    is_nucleus = numbers.top_p < 1
    return Bounds(jnp.where(is_nucleus, least, best.least), jnp.where(is_nucleus, end, best.end))


def _end_of_ties(ranks: Array, least: Array, n_ties: Array) -> Int[Array, "rows"]:
    """The first id behind the `n_ties` first of the tokens whose rank value is `least`."""
    vocab = ranks.shape[-1]
    is_tie, ids = ranks == least[:, None], jnp.arange(vocab)[None]

    def holds(end):
        return jnp.sum(is_tie & (ids < end[:, None]), axis=-1) <= n_ties

    return _greatest(holds, jnp.zeros_like(least), jnp.full_like(least, vocab + 1))


def _greatest(holds: Callable[[Array], Array], low: Array, high: Array) -> Int[Array, "rows"]:
    """The greatest integer below `high` for which `holds`, which is true of `low` and, once false, stays so."""

    def halve(bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # (low + high) // 2 without overflow
        is_held = holds(middle)
        return jnp.where(is_held, middle, low), jnp.where(is_held, high, middle)

    def is_open(bounds):
        low, high = bounds
        return jnp.any(low + 1 < high)

    return jax.lax.while_loop(is_open, halve, (low, high))[0]
