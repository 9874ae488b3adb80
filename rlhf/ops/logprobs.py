"""Log-probabilities of given tokens, from hidden states, without ever holding batch × time × vocabulary.

The vocabulary is run through in blocks, all tokens at once, with the softmax's sum kept up to date (Milakov and
Gimelshein, 2018, algorithm 3); the backward pass computes a block's logits again instead of keeping them. A block has
as many rows of the embedding as the logits in memory may be, so their number depends neither on the vocabulary nor on
the tokens. Each block's gradient is written once, where it belongs: sums over chunks of tokens instead would be an
embedding in float32 beside the gradient, read and written for every chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf.config import Number

LOGITS = 1 << 27  # logits in memory at once: 0.5 GB
_SMALLEST_BLOCK = 1024  # embedding rows; where even these are too many for all tokens, the tokens are cut as well
_LOWEST = -1e30  # finite: differences of two are 0 and not NaN


class TokenStatistics(NamedTuple):
    """Of the distribution that predicts each token, at the temperature asked for.

    logprobs: of the token itself, nats. entropy: nats. log_collision: log of the sum of squared probabilities, no
    gradient.
    """

    logprobs: Float[Array, "*rows time"]
    entropy: Float[Array, "*rows time"]
    log_collision: Float[Array, "*rows time"]


class _Tiles(NamedTuple):
    """How tokens × vocabulary is cut."""

    n_chunks: int
    n_blocks: int


def _tiles(n_tokens: int, n_vocab: int, n_logits: int) -> _Tiles:
    divisors = [n for n in range(1, n_vocab + 1) if n_vocab % n == 0]
    smallest = next(n for n in divisors if n >= min(n_vocab, _SMALLEST_BLOCK))
    block = max(smallest, max((n for n in divisors if n * n_tokens <= n_logits), default=1))
    return _Tiles(-(-n_tokens // max(1, n_logits // block)), n_vocab // block)


def _logits(hidden: Array, block: Array, inverse_temperature: Array) -> Float[Array, "tokens vocab"]:
    logits = jax.lax.dot_general(
        hidden, block, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )  # low-precision operands, float32 sums
    return logits * inverse_temperature


def _block(embedding: Array, n_blocks: int, index: Any, dtype: Any) -> Float[Array, "vocab width"]:
    """Rows index, index + n, index + 2n …: every block is as spread over devices as the whole vocabulary."""
    if n_blocks == 1:
        return embedding.astype(dtype)
    rows = embedding.reshape(-1, n_blocks, embedding.shape[1])
    return jax.lax.dynamic_index_in_dim(rows, index, axis=1, keepdims=False).astype(dtype)


def _over(n: int, step: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over n; without a loop where n is 1, so that no buffer is made for one."""
    if n > 1:
        return jax.lax.scan(step, carry, xs)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], out)


class _Sums(NamedTuple):
    """Of the blocks so far, for each token: highest logit, Σ e^(logit - highest), the target's logit; and, for the
    statistics, Σ e^(logit - highest) (logit - highest) and Σ e^(2 (logit - highest))."""

    highest: Array
    total: Array
    chosen: Array
    weighted: Array | None
    squares: Array | None


def _add_block(old: _Sums, logits: Array, place: Array) -> _Sums:
    """place: of the target in the block; -1 where it is in another."""
    highest = jnp.maximum(old.highest, jnp.max(logits, axis=-1))
    lower, shift = logits - highest[:, None], old.highest - highest
    powers, scale = jnp.exp(lower), jnp.exp(shift)
    # take_along_axis, not a gather of embedding rows: a vocabulary-sharded embedding stays sharded
    found = jnp.take_along_axis(logits, jnp.maximum(place, 0)[:, None], axis=-1)[:, 0]
    total = old.total * scale + jnp.sum(powers, axis=-1)
    chosen = jnp.where(place >= 0, found, old.chosen)
    if old.weighted is None or old.squares is None:
        return _Sums(highest, total, chosen, None, None)
    weighted = (old.weighted + shift * old.total) * scale + jnp.sum(powers * lower, axis=-1)
    return _Sums(highest, total, chosen, weighted, old.squares * scale**2 + jnp.sum(powers**2, axis=-1))


def _place(targets: Array, tiles: _Tiles, block: Any) -> Array:
    return jnp.where(targets % tiles.n_blocks == block, targets // tiles.n_blocks, -1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _score(hidden, embedding, targets, inverse_temperature, tiles, with_statistics):
    return _score_forward(hidden, embedding, targets, inverse_temperature, tiles, with_statistics)[0]


def _score_forward(hidden, embedding, targets, inverse_temperature, tiles, with_statistics):
    """hidden [chunks, tokens, width], targets [chunks, tokens]; the results are [chunks, tokens] too."""

    def step(sums, block):
        rows = _block(embedding, tiles.n_blocks, block, hidden.dtype)

        def add(_, chunk):
            old, h, target = chunk
            return None, _add_block(old, _logits(h, rows, inverse_temperature), _place(target, tiles, block))

        return _over(tiles.n_chunks, add, None, (sums, hidden, targets))[1], None

    zero = jnp.zeros(targets.shape, jnp.float32)
    more = (zero, zero) if with_statistics else (None, None)
    start = _Sums(jnp.full(targets.shape, _LOWEST), zero, zero, *more)
    sums, _ = _over(tiles.n_blocks, step, start, jnp.arange(tiles.n_blocks))
    log_totals = sums.highest + jnp.log(sums.total)
    result = [sums.chosen - log_totals]
    if with_statistics:
        # Σ p log p with log p = logit - highest - log total
        result += [jnp.log(sums.total) - sums.weighted / sums.total, jnp.log(sums.squares) - 2 * jnp.log(sums.total)]
    entropies = result[1] if with_statistics else None
    return result, (hidden, embedding, targets, inverse_temperature, log_totals, entropies)


def _score_backward(tiles, _, saved, gradients):
    hidden, embedding, targets, inverse_temperature, log_totals, entropies = saved
    zero = jnp.zeros((embedding.shape[0] // tiles.n_blocks, embedding.shape[1]), jnp.float32)

    def step(carry, block):
        d_hidden, d_temperature, d_embedding = carry
        rows = _block(embedding, tiles.n_blocks, block, hidden.dtype)

        def add(d_rows, chunk):
            h, target, log_total, g, of_entropy = chunk
            logits = _logits(h, rows, inverse_temperature)
            # d logprob / d logits = one_hot(target) - softmax(logits)
            place = _place(target, tiles, block)
            is_target = jax.lax.broadcasted_iota(target.dtype, logits.shape, 1) == place[:, None]
            logs = logits - log_total[:, None]
            d_logits = (is_target - jnp.exp(logs)) * g[:, None]
            if of_entropy is not None:  # d entropy / d logits = -p (log p + entropy)
                entropy, g = of_entropy
                d_logits -= jnp.exp(logs) * (logs + entropy[:, None]) * g[:, None]
            d_inverse = jnp.sum(d_logits * logits) / inverse_temperature
            scaled = (d_logits * inverse_temperature).astype(h.dtype)
            d_h = jax.lax.dot_general(scaled, rows, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            new = jax.lax.dot_general(scaled, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            return new if d_rows is None else d_rows + new, (d_h, d_inverse)

        start = None if tiles.n_chunks == 1 else zero
        of_entropy = None if entropies is None else (entropies, gradients[1])
        chunks = (hidden, targets, log_totals, gradients[0], of_entropy)
        d_rows, (d_h, d_inverse) = _over(tiles.n_chunks, add, start, chunks)
        if tiles.n_blocks == 1:
            return (d_h, jnp.sum(d_inverse), d_rows.astype(embedding.dtype)), None
        d_rows = d_rows.astype(embedding.dtype)
        d_embedding = jax.lax.dynamic_update_index_in_dim(d_embedding, d_rows, block, axis=1)
        return (d_hidden + d_h, d_temperature + jnp.sum(d_inverse), d_embedding), None

    split = jnp.zeros((embedding.shape[0] // tiles.n_blocks, tiles.n_blocks, embedding.shape[1]), embedding.dtype)
    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.float32(0), split)
    (d_hidden, d_temperature, d_embedding), _ = _over(tiles.n_blocks, step, start, jnp.arange(tiles.n_blocks))
    return d_hidden.astype(hidden.dtype), d_embedding.reshape(embedding.shape), None, d_temperature


_score.defvjp(_score_forward, _score_backward)


def _scores(
    hidden: Array, embedding: Array, targets: Array, temperature: Any, n_logits: int, more: bool
) -> list[Array]:
    n_tokens = hidden.shape[0]
    tiles = _tiles(n_tokens, embedding.shape[0], n_logits)
    missing = -n_tokens % tiles.n_chunks
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(tiles.n_chunks, -1, hidden.shape[1])
    targets = jnp.pad(targets, (0, missing)).reshape(tiles.n_chunks, -1)
    inverse_temperature = 1 / jnp.asarray(temperature, jnp.float32)
    found = _score(hidden, embedding, targets, inverse_temperature, tiles, more)
    return [x.reshape(-1)[:n_tokens] for x in found]


def target_logprobs(
    hidden: Float[Array, "tokens width"],
    embedding: Float[Array, "vocab width"],
    targets: Int[Array, "tokens"],
    temperature: Number = 1.0,
    n_logits: int = LOGITS,
) -> Float[Array, "tokens"]:
    """Log-probability (nats) of each target under softmax(hidden · embeddingᵀ / temperature).

    Differentiable in hidden, embedding and temperature; logits and sums are float32 whatever the inputs are. The
    products are of hidden's type, to which the embedding is cast a block at a time.

    n_logits: most logits in memory at once.
    """
    return _scores(hidden, embedding, targets, temperature, n_logits, False)[0]


def target_statistics(
    hidden: Float[Array, "tokens width"],
    embedding: Float[Array, "vocab width"],
    targets: Int[Array, "tokens"],
    temperature: Number = 1.0,
    n_logits: int = LOGITS,
) -> TokenStatistics:
    """`target_logprobs`, with entropy and log-collision (this one without gradient) of the same distributions."""
    logprobs, entropy, log_collision = _scores(hidden, embedding, targets, temperature, n_logits, True)
    return TokenStatistics(logprobs, entropy, jax.lax.stop_gradient(log_collision))
