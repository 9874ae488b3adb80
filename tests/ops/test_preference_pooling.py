"""From token log-probabilities to one number per answer, and pair weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.errors import ConfigError
from rlhf.ops.pair_weights import WPO, Unweighted
from rlhf.ops.pooling import Alpha, LengthDesensitized, Mean, Sum, count_tokens
from rlhf.ops.unpaired import APOZeroUnpaired, KahnemanTversky

# chosen: three answer tokens; rejected: one. 9s stand at tokens that must not count.
LOGPROBS = jnp.array([[[9.0, -1.0, -2.0, -3.0, 9.0], [9.0, 9.0, -4.0, 9.0, 9.0]]])
IS_ANSWER = jnp.array([[[False, True, True, True, False], [False, False, True, False, False]]])


def test_sum_and_mean():
    np.testing.assert_allclose(Sum()(LOGPROBS, IS_ANSWER), [[-6, -4]])
    np.testing.assert_allclose(Mean()(LOGPROBS, IS_ANSWER), [[-2, -4]])
    np.testing.assert_allclose(count_tokens(IS_ANSWER), [[3, 1]])


def test_length_desensitized_discounts_what_exceeds_the_shorter_answer():
    np.testing.assert_allclose(LengthDesensitized(alpha=0.25)(LOGPROBS, IS_ANSWER), [[-1 + 0.25 * -5, -4]])
    np.testing.assert_allclose(LengthDesensitized(alpha=1.0)(LOGPROBS, IS_ANSWER), Sum()(LOGPROBS, IS_ANSWER))


def test_length_desensitized_counts_answer_tokens_across_turns():
    two_turns = jnp.array([[[False, True, False, True, True], [False, True, True, False, False]]])
    logprobs = jnp.full((1, 2, 5), -1.0)
    np.testing.assert_allclose(LengthDesensitized(alpha=0.0)(logprobs, two_turns), [[-2, -2]])


def test_alpha_pooling_by_hand():
    np.testing.assert_allclose(
        Alpha(alpha=0.25)(LOGPROBS, IS_ANSWER), [[4 * (1 - np.exp(0.5)), 4 * (1 - np.e)]], rtol=1e-6
    )
    np.testing.assert_allclose(Alpha(alpha=1e-4)(LOGPROBS, IS_ANSWER), [[-2, -4]], rtol=1e-3)
    with pytest.raises(ConfigError, match=r"pooling.alpha=0 .* rlhf.ops.pooling.Mean"):
        Alpha(alpha=0)


@pytest.mark.parametrize("pooling", [Sum(), Mean(), LengthDesensitized(), Alpha()], ids=lambda p: type(p).__name__)
def test_an_answer_without_tokens_is_zero_and_its_gradient_finite(pooling):
    none = jnp.zeros_like(IS_ANSWER)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(pooling(x, none)))(LOGPROBS)
    assert value == 0
    np.testing.assert_array_equal(gradient, jnp.zeros_like(LOGPROBS))


def test_wpo_is_about_one_where_tokens_are_as_probable_as_sampled_ones():
    collision = jnp.where(IS_ANSWER, LOGPROBS, 5.0)
    np.testing.assert_allclose(WPO()(LOGPROBS, collision, IS_ANSWER), [1.0])
    np.testing.assert_allclose(WPO(aligned=False)(LOGPROBS, collision, IS_ANSWER), [np.exp(-6)], rtol=1e-6)
    np.testing.assert_allclose(Unweighted()(LOGPROBS, collision, IS_ANSWER), [1.0])


def test_no_gradient_flows_through_wpo_weights():
    gradient = jax.grad(lambda x: jnp.sum(WPO()(x, jnp.zeros_like(x), IS_ANSWER)))(LOGPROBS)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(LOGPROBS))


def test_kto_values_by_hand():
    ratios, kl, labels = jnp.array([3.0, 3.0]), jnp.array([1.0, 1.0]), jnp.array([True, False])
    sigmoid = 1 / (1 + np.exp(-1))  # of 0.5 (3 - 1)
    np.testing.assert_allclose(KahnemanTversky()(ratios, kl, labels, 0.5), [1 - sigmoid, sigmoid], rtol=1e-6)
    sigmoid = 1 / (1 + np.exp(-1.5))
    np.testing.assert_allclose(APOZeroUnpaired()(ratios, kl, labels, 0.5), [1 - sigmoid, sigmoid], rtol=1e-6)
