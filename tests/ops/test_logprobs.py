"""Chunked log-probabilities against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.ops import logprobs
from rlhf.ops.logprobs import target_logprobs, target_statistics


def plain(hidden, embedding, targets, temperature):
    logs = jax.nn.log_softmax(hidden @ embedding.T / temperature, axis=-1)
    return logs[jnp.arange(targets.shape[0]), targets]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(23, 8)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
    return hidden, embedding, jnp.asarray(rng.integers(0, 50, 23), jnp.int32)


def test_by_hand():
    hidden, embedding = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 5.0]])
    value = target_logprobs(hidden, embedding, jnp.array([0]), temperature=0.5)
    np.testing.assert_allclose(
        value, [-np.log1p(np.exp(-4.0))], rtol=1e-5
    )  # logits 2 and 0, halved temperature: 4 and 0


@pytest.mark.parametrize("n_logits", [10, 120, 600, 1 << 20])  # tokens cut, tokens and words, words, nothing
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradients_equal_the_plain_formula(arrays, n_logits, temperature, monkeypatch):
    monkeypatch.setattr(logprobs, "_SMALLEST_BLOCK", 10)
    hidden, embedding, targets = arrays
    weight = jnp.asarray(np.random.default_rng(1).normal(size=23), jnp.float32)

    def total(score):
        return lambda h, e, t: jnp.sum(weight * score(h, e, targets, t))

    ours = total(lambda *x: target_logprobs(*x, n_logits=n_logits))
    value, gradients = jax.value_and_grad(ours, argnums=(0, 1, 2))(hidden, embedding, jnp.float32(temperature))
    expected, expected_gradients = jax.value_and_grad(total(plain), argnums=(0, 1, 2))(
        hidden, embedding, jnp.float32(temperature)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours_one, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours_one, theirs, rtol=1e-5, atol=1e-5)


def test_entropy_and_collision(arrays, monkeypatch):
    monkeypatch.setattr(logprobs, "_SMALLEST_BLOCK", 10)
    hidden, embedding, targets = arrays
    statistics = target_statistics(hidden, embedding, targets, 0.7, n_logits=50)
    p = np.asarray(jax.nn.softmax(hidden @ embedding.T / 0.7, axis=-1), np.float64)
    np.testing.assert_allclose(statistics.entropy, -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(statistics.log_collision, np.log((p**2).sum(-1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics.logprobs, np.log(p[np.arange(23), targets]), rtol=1e-4)


@pytest.mark.parametrize("n_logits", [50, 1 << 20])
def test_entropy_has_the_gradient_of_the_plain_formula(arrays, n_logits, monkeypatch):
    monkeypatch.setattr(logprobs, "_SMALLEST_BLOCK", 10)
    hidden, embedding, targets = arrays
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 23)), jnp.float32)

    def ours(h, e, t):
        found = target_statistics(h, e, targets, t, n_logits=n_logits)
        return jnp.sum(weights[0] * found.logprobs + weights[1] * found.entropy)

    def expected(h, e, t):
        logs = jax.nn.log_softmax(h @ e.T / t, axis=-1)
        entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
        return jnp.sum(weights[0] * logs[jnp.arange(23), targets] + weights[1] * entropy)

    at = (hidden, embedding, jnp.float32(0.7))
    for one, other in zip(jax.grad(ours, (0, 1, 2))(*at), jax.grad(expected, (0, 1, 2))(*at), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def compiled_temp(n_tokens: int, n_vocab: int, score=target_logprobs) -> int:
    """Bytes that the compiled value and gradient needs beside its inputs and results, at 270M's width."""
    shape = jax.ShapeDtypeStruct

    def loss(hidden, embedding, targets):
        return -jnp.mean(score(hidden, embedding, targets))

    inputs = shape((n_tokens, 640), "float32"), shape((n_vocab, 640), "float32"), shape((n_tokens,), "int32")
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_vocabulary():
    small, large = compiled_temp(8192, 65_536), compiled_temp(8192, 262_144)
    assert large < 1.1 * small  # no embedding-sized array beside the gradient, which is a result
    assert large < 4 * logprobs.LOGITS + 4 * 640 * (2 * 8192 + 65_536)


def test_memory_falls_against_the_plain_form_as_tokens_grow():
    shares = [compiled_temp(n, 262_144) / compiled_temp(n, 262_144, lambda *x: plain(*x, 1.0)) for n in (1024, 8192)]
    assert shares[0] < 0.6
    assert shares[1] < 0.08


def test_bfloat16_errors_are_those_of_its_products():
    """Products of bfloat16 numbers, summed in float32: a log-probability is right to 1 %, and so is the gradient."""
    rng = np.random.default_rng(2)
    hidden, embedding = rng.normal(size=(64, 32)), rng.normal(size=(128, 32))
    targets = jnp.asarray(rng.integers(0, 128, 64), jnp.int32)

    def total(score):
        return lambda h, e: jnp.mean(score(h, e))

    def run(score, dtype):
        arrays = [jnp.asarray(x, dtype) for x in (hidden, embedding)]
        return jax.jit(score)(*arrays), jax.jit(jax.grad(total(score), argnums=(0, 1)))(*arrays)

    narrow, narrow_gradients = run(lambda h, e: target_logprobs(h, e, targets), "bfloat16")
    exact, exact_gradients = run(lambda h, e: plain(h, e, targets, 1.0), "float32")
    assert narrow.dtype == jnp.float32
    assert narrow_gradients[1].dtype == jnp.bfloat16
    assert np.linalg.norm(narrow - exact) < 0.01 * np.linalg.norm(exact)
    for one, other in zip(narrow_gradients, exact_gradients, strict=True):
        assert np.linalg.norm(np.asarray(one, np.float32) - other) < 0.02 * np.linalg.norm(other)
