"""Losses of a reward model and the calibration of its probabilities, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.ops.bradley_terry import calibration, label_losses, pair_losses, score_losses


def test_equal_scores_cost_ln_2():
    zeros = jnp.zeros(3)
    np.testing.assert_allclose(pair_losses(zeros, zeros, zeros, 0.5), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(label_losses(zeros, jnp.array([True, False, True])), np.log(2), rtol=1e-6)


def test_pairs_by_hand():
    chosen, rejected, margin = jnp.array([2.0, -1.0]), jnp.array([0.5, 1.0]), jnp.array([1.0, 0.0])
    expected = np.log1p(np.exp(-np.array([2 - 0.5 - 1, -2]))) + 0.1 * np.array([2.5, 0.0]) ** 2
    np.testing.assert_allclose(pair_losses(chosen, rejected, margin, 0.1), expected, rtol=1e-6)


def test_only_centering_sees_a_shift_of_both():
    chosen, rejected, margin = jnp.array([2.0]), jnp.array([0.5]), jnp.zeros(1)
    slope = jax.grad(lambda shift: pair_losses(chosen + shift, rejected + shift, margin, 0.0)[0])(0.0)
    assert slope == pytest.approx(0, abs=1e-6)
    centred = jax.grad(lambda shift: pair_losses(chosen + shift, rejected + shift, margin, 0.1)[0])(0.0)
    assert centred == pytest.approx(0.1 * 2 * 2.5 * 2, rel=1e-5)


def test_labels_and_ratings_by_hand():
    found = label_losses(jnp.array([1.0, 1.0]), jnp.array([True, False]))
    np.testing.assert_allclose(found, np.log1p(np.exp([-1.0, 1.0])), rtol=1e-6)
    np.testing.assert_allclose(score_losses(jnp.array([1.0, 5.0]), jnp.array([3.0, 5.0])), [2.0, 0.0])


def test_true_probabilities_have_no_calibration_error():
    random = np.random.default_rng(0)
    differences = random.normal(0, 2, 200_000)
    is_right = random.random(200_000) < 1 / (1 + np.exp(-np.abs(differences)))
    found = calibration(np.where(is_right, np.abs(differences), -np.abs(differences)))
    assert found.error < 0.01
    np.testing.assert_allclose(found.accuracy, found.confidence, atol=0.02)


def test_calibration_by_hand():
    """Four pairs at confidence sigmoid(3) = 0.953, half of them wrong; a tie is right by half, at confidence 0.5."""
    found = calibration(np.array([3.0, 3.0, -3.0, -3.0, 0.0]))
    assert found.n.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 4]
    assert found.accuracy[[0, 9]].tolist() == [0.5, 0.5]
    assert found.error == pytest.approx(0.8 * (1 / (1 + np.exp(-3)) - 0.5))
