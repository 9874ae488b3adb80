"""Log-probabilities of given tokens, from hidden states, without ever holding batch × time × vocabulary.

Tokens are scored in chunks; the backward pass computes a chunk's logits again instead of keeping them. At 262,144 words
a full copy of the logits of 8 × 1024 tokens would be 8.6 GB; a chunk of 512 tokens is 0.5 GB and is reused.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf.config import Number

CHUNK = 512  # tokens whose logits are in memory at once


class TokenStatistics(NamedTuple):
    """Of the distribution that predicts each token, at the temperature asked for.

    logprobs: of the token itself, nats. entropy: nats, no gradient. log_collision: log of the sum of squared
    probabilities, no gradient.
    """

    logprobs: Float[Array, "*rows time"]
    entropy: Float[Array, "*rows time"]
    log_collision: Float[Array, "*rows time"]


def _logits(hidden: Array, embedding: Array, inverse_temperature: Array) -> Float[Array, "tokens vocab"]:
    logits = jax.lax.dot_general(
        hidden, embedding, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )  # low-precision operands, float32 sums: no float32 copy of the embedding
    return logits * inverse_temperature


def _chunks(x: Array, n_chunks: int) -> Array:
    return x.reshape(n_chunks, x.shape[0] // n_chunks, *x.shape[1:])


def _score_chunk(embedding, inverse_temperature, chunk):
    hidden, targets = chunk
    logits = _logits(hidden, embedding, inverse_temperature)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    # take_along_axis, not a gather of embedding rows: a vocabulary-sharded embedding stays sharded
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - log_total, log_total


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden, embedding, targets, inverse_temperature, n_chunks):
    return _chunked_forward(hidden, embedding, targets, inverse_temperature, n_chunks)[0]


def _chunked_forward(hidden, embedding, targets, inverse_temperature, n_chunks):
    chunks = (_chunks(hidden, n_chunks), _chunks(targets, n_chunks))
    score = partial(_score_chunk, embedding, inverse_temperature)
    logprobs, log_totals = jax.lax.map(score, chunks)
    saved = (hidden, embedding, targets, inverse_temperature, log_totals)
    return logprobs.reshape(-1), saved


def _chunked_backward(n_chunks, saved, gradient):
    hidden, embedding, targets, inverse_temperature, log_totals = saved

    def step(d_embedding, chunk):
        h, target, log_total, g = chunk
        logits = _logits(h, embedding, inverse_temperature)
        # d logprob / d logits = one_hot(target) - softmax(logits)
        is_target = jax.lax.broadcasted_iota(target.dtype, logits.shape, 1) == target[:, None]
        probabilities = jnp.exp(logits - log_total[:, None])
        d_logits = (is_target - probabilities) * g[:, None]
        d_temperature = jnp.sum(d_logits * logits) / inverse_temperature
        scaled = (d_logits * inverse_temperature).astype(embedding.dtype)
        d_hidden = jax.lax.dot_general(scaled, embedding, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        d_embedding += jax.lax.dot_general(scaled, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return d_embedding, (d_hidden.astype(h.dtype), d_temperature)

    chunks = (*(_chunks(x, n_chunks) for x in (hidden, targets)), log_totals, _chunks(gradient, n_chunks))
    zero = jnp.zeros(embedding.shape, jnp.float32)
    d_embedding, (d_hidden, d_temperature) = jax.lax.scan(step, zero, chunks)
    d_hidden = d_hidden.reshape(hidden.shape)
    return d_hidden, d_embedding.astype(embedding.dtype), None, jnp.sum(d_temperature)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _padded(hidden: Array, targets: Array, chunk: int) -> tuple[Array, Array, int]:
    """Whole chunks: the fewest of at most `chunk` tokens, filled up with zeros."""
    n_tokens = hidden.shape[0]
    n_chunks = max(1, -(-n_tokens // chunk))
    missing = -n_tokens % n_chunks
    return jnp.pad(hidden, ((0, missing), (0, 0))), jnp.pad(targets, (0, missing)), n_chunks


def target_logprobs(
    hidden: Float[Array, "tokens width"],
    embedding: Float[Array, "vocab width"],
    targets: Int[Array, "tokens"],
    temperature: Number = 1.0,
    chunk: int = CHUNK,
) -> Float[Array, "tokens"]:
    """Log-probability (nats) of each target under softmax(hidden · embeddingᵀ / temperature).

    Differentiable in hidden, embedding and temperature; logits and sums are float32 whatever the inputs are.
    """
    n_tokens = hidden.shape[0]
    hidden, targets, n_chunks = _padded(hidden, targets, chunk)
    inverse_temperature = 1 / jnp.asarray(temperature, jnp.float32)
    return _chunked(hidden, embedding, targets, inverse_temperature, n_chunks)[:n_tokens]


def target_statistics(
    hidden: Float[Array, "tokens width"],
    embedding: Float[Array, "vocab width"],
    targets: Int[Array, "tokens"],
    temperature: Number = 1.0,
    chunk: int = CHUNK,
) -> TokenStatistics:
    """`target_logprobs`, with entropy and log-collision of the same distributions (these two without gradient)."""
    n_tokens = hidden.shape[0]
    padded, padded_targets, n_chunks = _padded(hidden, targets, chunk)
    inverse_temperature = 1 / jnp.asarray(temperature, jnp.float32)
    logprobs = _chunked(padded, embedding, padded_targets, inverse_temperature, n_chunks)[:n_tokens]

    def measure(chunk_hidden):
        logs = jax.nn.log_softmax(_logits(chunk_hidden, embedding, inverse_temperature), axis=-1)
        return -jnp.sum(jnp.exp(logs) * logs, axis=-1), jax.nn.logsumexp(2 * logs, axis=-1)

    entropy, collision = jax.lax.stop_gradient(jax.lax.map(measure, _chunks(jax.lax.stop_gradient(padded), n_chunks)))
    return TokenStatistics(logprobs, entropy.reshape(-1)[:n_tokens], collision.reshape(-1)[:n_tokens])
