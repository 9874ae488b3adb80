"""Token rewards, advantages, whitening and the value loss, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.ops.gae import explained_variance, generalized_advantage, token_rewards, value_losses, whiten
from rlhf.ops.reward_shaping import Adaptive, Shaping

# two answers: of three tokens at places 1 to 3, and of one token at place 2
IS_ANSWER = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], bool)
VALUES = np.array([[9, 1, 2, 3, 9], [9, 9, 4, 9, 9]], np.float32)


def test_the_score_is_the_last_tokens_and_the_penalty_each_ones_own():
    penalty = np.full((2, 5), 0.5, np.float32)
    found = token_rewards(np.array([10, 20], np.float32), penalty, IS_ANSWER)
    np.testing.assert_array_equal(found, [[0, -0.5, -0.5, 9.5, 0], [0, 0, 19.5, 0, 0]])


def test_advantages_by_hand():
    rewards = token_rewards(np.array([10, 20], np.float32), np.zeros((2, 5), np.float32), IS_ANSWER)
    found = generalized_advantage(rewards, VALUES, IS_ANSWER, 0.9, 0.5)
    last = 10 - 3
    middle = (0 + 0.9 * 3 - 2) + 0.9 * 0.5 * last
    first = (0 + 0.9 * 2 - 1) + 0.9 * 0.5 * middle
    np.testing.assert_allclose(found, [[0, first, middle, last, 0], [0, 0, 20 - 4, 0, 0]], rtol=1e-6)


def test_without_discount_a_return_is_what_is_still_earned():
    """gamma = lambda = 1: advantage + value is the sum of the rewards to come, whatever the values."""
    rewards = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32) * IS_ANSWER
    found = generalized_advantage(rewards, VALUES, IS_ANSWER, 1.0, 1.0) + VALUES
    np.testing.assert_allclose(found[0, 1:4], np.cumsum(rewards[0, 3:0:-1])[::-1], rtol=1e-5)


def test_nothing_outside_an_answer_counts():
    rewards = np.ones((2, 5), np.float32) * IS_ANSWER
    other = np.where(IS_ANSWER, VALUES, -100).astype(np.float32)
    found = [generalized_advantage(rewards, values, IS_ANSWER, 0.9, 0.9) for values in (VALUES, other)]
    np.testing.assert_array_equal(*found)


def test_whitening_by_numpy():
    values = np.random.default_rng(1).normal(3, 2, (2, 5)).astype(np.float32)
    known = values[IS_ANSWER]
    found = whiten(values, IS_ANSWER)[IS_ANSWER]
    np.testing.assert_allclose(found, (known - known.mean()) / known.std(ddof=1), rtol=1e-5)
    kept = whiten(values, IS_ANSWER, keep_mean=True)
    np.testing.assert_allclose(kept[IS_ANSWER], found + known.mean(), rtol=1e-5)
    np.testing.assert_array_equal(kept[~IS_ANSWER], 0)


@pytest.mark.parametrize("values", [np.full((2, 5), 7, np.float32), VALUES])
def test_whitening_what_has_no_spread_is_finite(values):
    one = np.zeros((2, 5), bool)
    one[0, 1] = True
    for mask in (one, np.zeros((2, 5), bool)):
        np.testing.assert_array_equal(whiten(values, mask), 0)
    np.testing.assert_array_equal(whiten(np.full((2, 5), 7, np.float32), IS_ANSWER), 0)


def test_value_loss_takes_the_larger_error():
    values, old = jnp.array([[1.0, 3.0, 0.5]]), jnp.array([[0.0, 2.9, 0.5]])
    returns = jnp.array([[2.0, 3.0, 0.0]])
    losses, is_clipped = value_losses(values, old, returns, 0.2)
    # the first moved by 1, of which 0.2 count: (0.2 - 2)² / 2; the others stayed within
    np.testing.assert_allclose(losses, [[1.8**2 / 2, 0, 0.25 / 2]], rtol=1e-6)
    np.testing.assert_array_equal(is_clipped, [[True, False, False]])
    plain, never = value_losses(values, old, returns, None)
    np.testing.assert_allclose(plain, [[0.5, 0, 0.125]], rtol=1e-6)
    assert not never.any()


def test_explained_variance():
    returns = np.array([[0, 1, 2, 3, 0], [0, 0, 6, 0, 0]], np.float32)
    assert explained_variance(returns, returns, IS_ANSWER) == 1.0
    assert explained_variance(np.full((2, 5), 3, np.float32), returns, IS_ANSWER) == 0.0
    assert explained_variance(-returns, returns, IS_ANSWER) == pytest.approx(1 - 4)
    assert explained_variance(VALUES, np.full((2, 5), 3, np.float32), IS_ANSWER) == 0.0


def test_shaping_in_its_order():
    shaping = Shaping(missing_eos_penalty=1.0, scale=2.0, clip=3.0)
    scores, cut = np.array([1, 5, 1], np.float32), np.array([True, False, False])
    found = shaping(scores, cut, np.array([True, True, False]), {})
    np.testing.assert_array_equal(found, [0, 3, 0])  # the third was not judged


def test_running_normalisation_knows_all_scores_so_far():
    random, memory, shaping = np.random.default_rng(2), {}, Shaping(normalised=True)
    batches = [random.normal(3, 5, 7).astype(np.float32) for _ in range(5)]
    everyone, never = np.ones(7, bool), np.zeros(7, bool)
    found = [shaping(batch, never, everyone, memory) for batch in batches]
    known = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(found[-1], (batches[-1] - known.mean()) / known.std(), rtol=1e-5)
    np.testing.assert_array_equal(Shaping(normalised=True)(np.full(7, 4, np.float32), never, everyone, {}), 0)


def test_an_adaptive_coefficient_follows_its_target():
    """Ziegler et al., 2019: the relative error is clipped to a fifth."""
    kl = Adaptive(coef=0.1, target=6.0, horizon=100.0)
    assert kl.followed(0.1, 60.0, 10) == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    assert kl.followed(0.1, 6.6, 10) == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    assert kl.followed(0.1, -3.0, 10) == pytest.approx(0.1 * (1 - 0.2 * 10 / 100))
