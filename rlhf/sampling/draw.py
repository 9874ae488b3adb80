"""Drawing one token for each row, exactly from its filtered distribution, without sorting the vocabulary.

A row with top-k or top-p looks at its CANDIDATES most likely tokens. If these certainly hold all that its filters keep,
it draws among them; else the exact bounds are searched (`rlhf.sampling.search`) and it draws from the whole vocabulary,
like rows without top-k and top-p. Which way a row goes depends on that row alone, so its draw does not depend on the
rest of the batch. A draw inverts the cumulative distribution in the order of token ids, at numbers given from outside.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf.sampling.methods import Numbers
from rlhf.sampling.search import Bounds, everything, is_kept, search_bounds

CANDIDATES = 64  # the most likely tokens, looked at first
_FEW = 1024  # a vocabulary from which top_k takes the candidates directly


class Drawn(NamedTuple):
    """tokens: one for each row. filtered_logprobs: of these under the distribution they were drawn from, nats."""

    tokens: Int[Array, "rows"]
    filtered_logprobs: Float[Array, "rows"]


def draw(numbers: Numbers, logits: Float[Array, "rows vocab"], uniforms: Float[Array, "rows two"]) -> Drawn:
    """One token for each row. Logits of -inf are never drawn.

    uniforms: two numbers in [0, 1) for each row, all that a draw depends on besides its logits and numbers.
    """
    nothing = Drawn(jnp.zeros(logits.shape[0], jnp.int32), jnp.zeros(logits.shape[0]))
    tops = jnp.max(logits, axis=-1)
    is_greedy = numbers.temperature == 0
    is_cut = ~is_greedy & ((numbers.top_k > 0) | (numbers.top_p < 1))
    # A branch that no row takes costs nothing.
    few, is_exact = jax.lax.cond(
        jnp.any(is_cut), _from_candidates, lambda *_: (nothing, is_greedy), numbers, logits, tops, uniforms
    )
    is_few = is_cut & is_exact
    is_wide = ~is_greedy & ~is_few
    wide = jax.lax.cond(
        jnp.any(is_wide), partial(_from_all, is_cut & ~is_exact), lambda *_: nothing, numbers, logits, tops, uniforms
    )
    best = jax.lax.cond(jnp.any(is_greedy), _most_likely, lambda _: nothing.tokens, logits)
    tokens = jnp.where(is_greedy, best, jnp.where(is_few, few.tokens, wide.tokens))
    logprobs = jnp.where(is_few, few.filtered_logprobs, wide.filtered_logprobs)
    return Drawn(tokens, jnp.where(is_greedy, 0.0, logprobs))


def _most_likely(logits: Array) -> Int[Array, "rows"]:
    """argmax in two stages: XLA's own over a large vocabulary takes ten times as long on CPU."""
    rows, vocab = logits.shape
    blocks = logits.reshape(rows, -1, _divisor(vocab, vocab**0.5))
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * blocks.shape[-1] + jnp.argmax(inside, axis=-1).astype(jnp.int32)


def candidates(logits: Float[Array, "rows vocab"], n: int) -> tuple[Float[Array, "rows n"], Int[Array, "rows n"]]:
    """The n largest logits of each row and their ids, largest first.

    In two stages where the vocabulary is large: the n blocks with the largest maxima hold them all.
    """
    rows, vocab = logits.shape
    width = _divisor(vocab, (vocab / n) ** 0.5)
    if vocab <= _FEW or width == 1 or vocab // width < n:
        values, ids = jax.lax.top_k(logits, n)
        return values, ids.astype(jnp.int32)
    blocks = logits.reshape(rows, -1, width)
    chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), n)[1], axis=-1).astype(jnp.int32)
    inside = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1)
    values, places = jax.lax.top_k(inside, n)
    ids = jnp.take_along_axis(chosen, places // width, axis=1) * width + places % width
    return values, ids.astype(jnp.int32)


def _from_candidates(
    numbers: Numbers, logits: Array, tops: Array, uniforms: Array
) -> tuple[Drawn, Bool[Array, "rows"]]:
    """A draw among the candidates, and whether they hold all that the filters keep."""
    n = min(CANDIDATES, logits.shape[-1])
    values, ids = candidates(logits, n)
    temperature = jnp.where(numbers.temperature == 0, 1.0, numbers.temperature)[:, None]
    heights = (values - tops[:, None]) / temperature
    has_top_k = (numbers.top_k > 0)[:, None]
    heights = jnp.where(has_top_k & (jnp.arange(n)[None] >= numbers.top_k[:, None]), -jnp.inf, heights)
    weights = jnp.exp(heights)

    def weigh_all(_):
        return jnp.sum(jnp.exp((logits - tops[:, None]) / temperature), axis=-1)

    # Without top-k, shares are of the whole vocabulary and not of the candidates.
    inside = jnp.sum(weights, axis=-1)
    total = jnp.where(has_top_k[:, 0], inside, jax.lax.cond(jnp.all(has_top_k), lambda _: inside, weigh_all, None))
    before = jnp.cumsum(weights, axis=-1) - weights
    floor = jnp.log(numbers.min_p)[:, None]
    is_drawn = (before < (numbers.top_p * total)[:, None]) & (heights >= floor)

    is_min_p_enough = (heights[:, -1] < floor[:, 0]) & (~has_top_k[:, 0] | (numbers.top_p >= 1))
    is_nucleus_inside = ~has_top_k[:, 0] & (inside >= numbers.top_p * total) & (numbers.top_p < 1)
    is_exact = (has_top_k[:, 0] & (numbers.top_k <= n)) | is_nucleus_inside | is_min_p_enough | (n == logits.shape[-1])
    return _invert_few(jnp.where(is_drawn, weights, 0.0), heights, ids, uniforms[:, 0]), is_exact


def _invert_few(weights: Array, heights: Array, ids: Array, uniforms: Array) -> Drawn:
    """The candidate at which the cumulative weight in the order of ids passes uniform · total."""
    is_before = ids[:, None, :] < ids[:, :, None]
    before = jnp.sum(jnp.where(is_before, weights[:, None, :], 0.0), axis=-1)
    total = jnp.sum(weights, axis=-1)
    is_passed = (weights > 0) & (before <= (uniforms * total)[:, None])
    place = jnp.argmax(jnp.where(is_passed, before, -1.0), axis=-1)[:, None]
    token = jnp.take_along_axis(ids, place, axis=1)[:, 0]
    return Drawn(token, jnp.take_along_axis(heights, place, axis=1)[:, 0] - jnp.log(total))


def _from_all(is_searched: Array, numbers: Numbers, logits: Array, tops: Array, uniforms: Array) -> Drawn:
    """A draw from the whole vocabulary: first one of about sqrt(vocab) blocks by its weight, then a token of it."""
    rows, vocab = logits.shape
    searched = jax.lax.cond(jnp.any(is_searched), partial(search_bounds, numbers), _no_bounds, logits, tops)
    bounds = Bounds(*(jnp.where(is_searched, x, y) for x, y in zip(searched, everything(logits), strict=True)))
    temperature = jnp.where(numbers.temperature == 0, 1.0, numbers.temperature)[:, None]
    floor = jnp.log(numbers.min_p)[:, None]

    def weigh(some, ids):
        heights = (some - tops[:, None]) / temperature
        return jnp.where(is_kept(some, ids, bounds) & (heights >= floor), jnp.exp(heights), 0.0)

    width = _divisor(vocab, vocab**0.5)
    blocks = jnp.sum(weigh(logits, jnp.arange(vocab)[None]).reshape(rows, -1, width), axis=-1)
    block = _invert(blocks, uniforms[:, 0])
    ids = block[:, None] * width + jnp.arange(width)[None]
    inside = jnp.take_along_axis(logits, ids, axis=1)
    place = _invert(weigh(inside, ids), uniforms[:, 1])[:, None]
    height = (jnp.take_along_axis(inside, place, axis=1) - tops[:, None]) / temperature
    logprobs = height[:, 0] - jnp.log(jnp.sum(blocks, axis=-1))
    return Drawn(jnp.take_along_axis(ids, place, axis=1)[:, 0], logprobs)


def _no_bounds(logits: Array, tops: Array) -> Bounds:
    return everything(logits)


def _invert(weights: Float[Array, "rows n"], uniforms: Float[Array, "rows"]) -> Int[Array, "rows"]:
    """The place at which the cumulative weight passes uniform · total; never one of no weight."""
    sums = jnp.cumsum(weights, axis=-1)
    is_passed = (weights > 0) & (sums - weights <= uniforms[:, None] * sums[:, -1:])
    places = jnp.arange(weights.shape[-1])[None]
    return jnp.max(jnp.where(is_passed, places, 0), axis=-1).astype(jnp.int32)


def _divisor(n: int, near: float) -> int:
    """The divisor of n that is nearest to `near`, by ratio."""
    divisors = {d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)}
    return min(divisors, key=lambda d: abs(math.log(d / near)))
