"""Cached logits against the model without a cache, at every step and far past the window."""

import jax
import jax.numpy as jnp
import numpy as np
from test_generate import SMALL, prompts_of, small  # noqa: F401

from rlhf.sampling import cache as caches
from rlhf.sampling.weights import DecodingWeights

ROOM, NEW, CHUNK = 32, 40, 8


def test_cached_logits_equal_full_recomputation(small):  # noqa: F811
    """Rows of 9 and 26 prompt tokens, then 40 more, with a window of 5."""
    model, params = small
    rows = np.array(prompts_of((66, 66)), np.int32)
    lengths = np.array([9, 26], np.int32)
    weights = DecodingWeights(model).of(params)
    tokens = np.where(np.arange(ROOM)[None] < lengths[:, None], rows[:, :ROOM], 0)

    @jax.jit
    def run(weights, tokens, lengths, rows):
        staged = caches.empty_cache(SMALL, 2, ROOM, "float32", has_rings=False)
        staged = caches.prefill(model, weights, staged, tokens, (jnp.int32(0), jnp.int32(ROOM // CHUNK)), CHUNK)
        prompts = caches.empty_cache(SMALL, 2, ROOM, "float32", has_rings=True)
        for place in range(2):
            prompts = caches.take_seat(model, prompts, jnp.int32(place), staged, jnp.int32(place), lengths[place] - 1)

        def step(cache, t):
            last = jnp.take_along_axis(rows, (lengths - 1 + t)[:, None], axis=1)[:, 0]
            hidden, cache = caches.decode(model, weights, prompts, cache, lengths - 1, last, jnp.full(2, t))
            return cache, model.unembed(weights, hidden)

        answers = caches.empty_cache(SMALL, 2, NEW, "float32", has_rings=True)
        return jax.lax.scan(step, answers, jnp.arange(NEW))[1]

    cached = np.asarray(run(weights, tokens, lengths, rows))
    positions = np.tile(np.arange(66, dtype=np.int32), (2, 1))
    whole = np.asarray(jax.jit(model.logits)(params, rows, np.ones_like(rows), positions))
    assert SMALL.window < NEW // 4
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(cached[:, row], whole[row, n - 1 : n - 1 + NEW], atol=1e-4)
