"""Chunked log-probabilities against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("chunk", [1, 5, 23, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradients_equal_the_plain_formula(arrays, chunk, temperature):
    hidden, embedding, targets = arrays
    weight = jnp.asarray(np.random.default_rng(1).normal(size=23), jnp.float32)

    def total(score):
        return lambda h, e, t: jnp.sum(weight * score(h, e, targets, t))

    ours = total(lambda *x: target_logprobs(*x, chunk=chunk))
    value, gradients = jax.value_and_grad(ours, argnums=(0, 1, 2))(hidden, embedding, jnp.float32(temperature))
    expected, expected_gradients = jax.value_and_grad(total(plain), argnums=(0, 1, 2))(
        hidden, embedding, jnp.float32(temperature)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours_one, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours_one, theirs, rtol=1e-4, atol=1e-5)


def test_entropy_and_collision(arrays):
    hidden, embedding, targets = arrays
    statistics = target_statistics(hidden, embedding, targets, 0.7, chunk=5)
    p = np.asarray(jax.nn.softmax(hidden @ embedding.T / 0.7, axis=-1), np.float64)
    np.testing.assert_allclose(statistics.entropy, -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(statistics.log_collision, np.log((p**2).sum(-1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics.logprobs, np.log(p[np.arange(23), targets]), rtol=1e-4)


def test_no_array_of_all_tokens_times_vocabulary():
    hidden, embedding = jnp.zeros((64, 4)), jnp.zeros((1000, 4))
    gradient = jax.grad(lambda h, e: target_logprobs(h, e, jnp.zeros(64, jnp.int32), chunk=8).sum(), argnums=(0, 1))
    largest = max(
        int(np.prod(variable.aval.shape))
        for equation in jax.make_jaxpr(gradient)(hidden, embedding).eqns
        for variable in equation.outvars
    )
    assert largest <= 8 * 1000
