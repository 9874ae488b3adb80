"""GRPO's loss on a bandit whose every arm is in the batch: the optimum and the gradients that theory gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bandit import MODEL

from rlhf.algorithms.grpo import GRPO
from rlhf.ops.kl import K1, K2, InLoss, InReward
from rlhf.ops.policy import AnswerRatio, TokenRatio


def grpo(**changes) -> GRPO:
    return GRPO(learning_rate=1e-3, batch_size=4, group_size=4, microbatch_size=4, max_new_tokens=4, **changes)


ARMS = np.array([0.3, -0.5, 0.8, 0.1], np.float32)  # rewards
REFERENCE = np.array([0.2, 0.9, -0.4, 0.0], np.float32)  # logits


def exact_batch(logits, kl):
    """Every arm once, weighed by its probability: the loss is then an expectation."""
    probabilities, n = jax.nn.softmax(logits), len(ARMS)
    logprobs, reference = jax.nn.log_softmax(logits), jax.nn.log_softmax(jnp.asarray(REFERENCE))
    place = jnp.zeros((n, 2))
    penalty = kl.coef * (logprobs - reference) if isinstance(kl, InReward) else jnp.zeros(n)
    return {
        "tokens": jnp.stack([jnp.zeros(n, jnp.int32), jnp.arange(n, dtype=jnp.int32)], axis=1),
        "segments": jnp.ones((n, 2), jnp.int32),
        "is_answer": place.astype(bool).at[:, 1].set(True),
        "weight": place.at[:, 1].set(probabilities * n),
        "token_weight": place.at[:, 1].set(1.0),
        "is_chosen": place.at[:, 1].set(1.0),
        "sampler_logprobs": place.at[:, 1].set(logprobs),
        "reference_logprobs": place.at[:, 1].set(reference),
        "advantages": place.at[:, 1].set(jnp.asarray(ARMS) - penalty),
    }


PLACES = [
    InReward(coef=0.5),
    InLoss(coef=0.5, estimator=K2()),
    InLoss(coef=0.5, importance_weighted=True),
    InLoss(coef=0.5, estimator=K1(), importance_weighted=True),
]


@pytest.mark.parametrize("kl", PLACES, ids=repr)
def test_the_optimum_of_a_bandit_is_the_closed_form(kl):
    """π* ∝ π_ref exp(r / β) (Rafailov et al., 2023, eq. 4)."""
    algorithm = grpo(kl=kl, ratio=AnswerRatio() if isinstance(kl, InReward) else TokenRatio())

    @jax.jit
    def descend(logits):
        def step(logits, _):
            made = jax.lax.stop_gradient(exact_batch(logits, kl))
            gradient = jax.grad(lambda p: algorithm.loss(MODEL, {"model": p}, made)[0])(logits)
            return logits - 2.0 * gradient, None

        return jax.lax.scan(step, logits, None, length=600)[0]

    found = jax.nn.softmax(descend(jnp.array([1.0, -1.0, 0.0, 0.5])))
    best = jax.nn.softmax(jnp.asarray(REFERENCE) + ARMS / 0.5)
    np.testing.assert_allclose(found, best, atol=1e-3)


def test_gradients_of_the_estimators_in_the_loss_are_the_exact_ones():
    logits, reference = jnp.array([1.0, -1.0, 0.0, 0.5]), jax.nn.log_softmax(jnp.asarray(REFERENCE))

    def reverse(x):
        return jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference))

    def forward(x):
        return jnp.sum(jnp.exp(reference) * (reference - jax.nn.log_softmax(x)))

    def found(kl):
        made = {**exact_batch(logits, kl), "advantages": jnp.zeros((4, 2))}
        if isinstance(kl, InReward):
            made["advantages"] = exact_batch(logits, kl)["advantages"] - exact_batch(logits, InLoss())["advantages"]
        return jax.grad(lambda p: grpo(kl=kl).loss(MODEL, {"model": p}, made)[0])(logits)

    for kl in PLACES:
        np.testing.assert_allclose(found(kl), 0.5 * jax.grad(reverse)(logits), atol=1e-6, err_msg=repr(kl))
    np.testing.assert_allclose(found(InLoss(coef=0.5)), 0.5 * jax.grad(forward)(logits), atol=1e-6)
