"""Ratios, policy losses, corrections and divergence estimates against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.errors import ConfigError
from rlhf.ops.kl import K1, K2, K3, kl_metrics
from rlhf.ops.policy import (
    AnswerRatio,
    Clipped,
    ClippedWeight,
    DualClipped,
    NegativeMask,
    PolicyTokens,
    SequenceRatio,
    SoftGate,
    TokenRatio,
    TruncatedImportance,
    Unclipped,
    ratio_metrics,
)

IS_ANSWER = jnp.array([[False, True, True, True], [False, True, False, False]])
LOG_RATIO = jnp.array([[0.0, 0.3, -0.6, 0.0], [0.0, 0.5, 0.0, 0.0]])


def tokens(log_ratio=LOG_RATIO, advantages=1.0, sampler=0.0, ratio=None) -> PolicyTokens:
    old = jnp.full(log_ratio.shape, -1.0) * IS_ANSWER
    new = old + log_ratio
    return PolicyTokens(
        logprobs=new,
        old_logprobs=old,
        sampler_logprobs=(old + sampler) * IS_ANSWER,
        ratio=(ratio or TokenRatio())(log_ratio, IS_ANSWER),
        advantages=jnp.broadcast_to(jnp.asarray(advantages, jnp.float32), log_ratio.shape) * IS_ANSWER,
        is_answer=IS_ANSWER,
    )


def test_levels_of_the_ratio():
    np.testing.assert_allclose(TokenRatio()(LOG_RATIO, IS_ANSWER), np.exp(LOG_RATIO), rtol=1e-6)
    np.testing.assert_allclose(SequenceRatio()(LOG_RATIO, IS_ANSWER)[:, 1], np.exp([-0.1, 0.5]), rtol=1e-6)
    np.testing.assert_allclose(AnswerRatio()(LOG_RATIO, IS_ANSWER)[:, 1], np.exp([-0.3, 0.5]), rtol=1e-6)
    huge = jnp.full((1, 4), 900.0)
    for level in (TokenRatio(), SequenceRatio(), AnswerRatio()):
        assert np.isfinite(level(huge, jnp.ones((1, 4), bool))).all()


def test_clipping_by_hand():
    """Ratios 1.35, 0.549, 1 and 1.65 with bounds 0.8 and 1.28."""
    policy, up, down = Clipped(low=0.2, high=0.28), tokens(advantages=2.0), tokens(advantages=-2.0)
    np.testing.assert_allclose(policy(up)[0, 1:], [-2.56, -2 * np.exp(-0.6), -2], rtol=1e-6)
    np.testing.assert_allclose(policy(down)[0, 1:], [2 * np.exp(0.3), 1.6, 2], rtol=1e-6)
    low, high = policy.clipped(up)
    assert (int(low.sum()), int(high.sum())) == (0, 2)
    low, high = policy.clipped(down)
    assert (int(low.sum()), int(high.sum())) == (1, 0)


def test_what_is_clipped_has_no_gradient():
    def loss(log_ratio):
        return jnp.sum(Clipped()(tokens(log_ratio, advantages=2.0)) * IS_ANSWER)

    gradient = jax.grad(loss)(LOG_RATIO)
    np.testing.assert_allclose(gradient[0], [0, 0, -2 * np.exp(-0.6), -2], rtol=1e-6)
    assert gradient[1, 1] == 0


def test_dual_clipping_bounds_what_an_unlikely_answer_costs():
    log_ratio = jnp.array([[0.0, np.log(5.0), 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    policy = DualClipped(largest=3.0)
    np.testing.assert_allclose(policy(tokens(log_ratio, -1.0))[0, 1], 3.0, rtol=1e-6)
    np.testing.assert_allclose(Clipped()(tokens(log_ratio, -1.0))[0, 1], 5.0, rtol=1e-6)
    np.testing.assert_allclose(policy(tokens(log_ratio, 1.0))[0, 1], -1.2, rtol=1e-6)
    assert bool(policy.clipped(tokens(log_ratio, -1.0))[1][0, 1])
    with pytest.raises(ConfigError, match=r"largest=1.1 of DualClipped must be at least 1 \+ high = 1.2"):
        DualClipped(largest=1.1)


def test_a_clipped_weight_keeps_the_gradient():
    def loss(log_ratio):
        return jnp.sum(ClippedWeight(largest=1.2)(tokens(log_ratio, 1.0)) * IS_ANSWER)

    gradient = jax.grad(loss)(LOG_RATIO)
    np.testing.assert_allclose(gradient[0], [0, -1.2, -np.exp(-0.6), -1], rtol=1e-6)
    np.testing.assert_allclose(gradient[1, 1], -1.2, rtol=1e-6)


def test_every_loss_is_the_policy_gradient_where_nothing_has_moved():
    still = jnp.zeros((2, 4))
    for policy in (Unclipped(), Clipped(), DualClipped(), ClippedWeight(), SoftGate()):
        gradient = jax.grad(lambda x, policy=policy: jnp.sum(policy(tokens(x, 0.7)) * IS_ANSWER))(still)
        np.testing.assert_allclose(gradient, -0.7 * IS_ANSWER, rtol=1e-6, err_msg=repr(policy))


def test_importance_weights_are_bounded_and_have_no_gradient():
    weights = TruncatedImportance(largest=2.0)(tokens(sampler=jnp.array([[0.0, 0.5, -0.5, -3.0]] * 2)))
    np.testing.assert_allclose(weights[0, 1:], [np.exp(-0.5), np.exp(0.5), 2.0], rtol=1e-6)
    assert weights[1, 3] == 1  # outside the answer
    gradient = jax.grad(lambda x: jnp.sum(TruncatedImportance()(tokens(x, sampler=-0.5))))(LOG_RATIO)
    assert not gradient.any()


def test_bad_answers_that_are_far_away_do_not_count():
    """Mean distances: sampler − new = 0.2 − (0.3 − 0.6) / 3 = 0.3 and 0.2 − 0.5 = −0.3."""
    for threshold, expected in ((0.29, [0, 1]), (0.31, [1, 1])):
        kept = NegativeMask(threshold=threshold)(tokens(advantages=-1.0, sampler=0.2))
        np.testing.assert_array_equal(kept[:, 1], expected)
    assert NegativeMask(threshold=0.0)(tokens(advantages=1.0, sampler=9.0)).all()


def test_metrics_by_hand():
    weight = IS_ANSWER * (2 / 4)  # the mean over four tokens
    found = ratio_metrics(tokens(advantages=1.0), Clipped(), weight)
    ratios = np.exp([0.3, -0.6, 0.0, 0.5])
    np.testing.assert_allclose(found["policy/ratio"], ratios.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["policy/ratio/max"], ratios.max(), rtol=1e-6)
    np.testing.assert_allclose(found["policy/approx_kl"], (ratios - 1 - np.log(ratios)).mean(), rtol=1e-5)
    assert [float(found[f"policy/clipfrac{name}"]) for name in ("_low", "_high", "")] == [0, 0.5, 0.5]


def test_estimators_are_what_they_estimate():
    """Over all of a distribution: k1 and k3 give KL(π ‖ π_ref) itself; k2 nearly, where these are near."""
    logits = np.random.default_rng(0).normal(size=(2, 50)) * [[1.0], [0.9]]
    policy, reference = jax.nn.log_softmax(jnp.asarray(logits[0])), jax.nn.log_softmax(jnp.asarray(logits[0] * 0.95))
    exact = float(jnp.sum(jnp.exp(policy) * (policy - reference)))
    expected = [float(jnp.sum(jnp.exp(policy) * k(policy - reference))) for k in (K1(), K2(), K3())]
    np.testing.assert_allclose(expected[0], exact, rtol=1e-4)
    np.testing.assert_allclose(expected[2], exact, rtol=1e-3)
    np.testing.assert_allclose(expected[1], exact, rtol=0.1)
    by_hand = kl_metrics(jnp.array([[0.5, -0.2]]), jnp.array([[0.5, 0.5]]))
    np.testing.assert_allclose(by_hand["kl/k1"], 0.15, rtol=1e-6)
    np.testing.assert_allclose(by_hand["kl/k2"], (0.125 + 0.02) / 2, rtol=1e-5)
    np.testing.assert_allclose(by_hand["kl/k3"], (np.exp(-0.5) - 0.5 + np.exp(0.2) - 1.2) / 2, rtol=1e-5)
    assert np.isfinite(K3()(jnp.float32(-1e4)))
