"""Losses on pairs by hand and at their edges; the reference numbers are compared in tests/algorithms/test_dpo.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.errors import ConfigError
from rlhf.ops.divergence import AlphaDivergence, ForwardKL, JensenShannon, ReverseKL
from rlhf.ops.preference import EXO, IPO, DiscoPOP, Hinge, Mixture, Pairs, Robust, Sigmoid
from rlhf.ops.preference_absolute import BCO, NCA, SPPO, APODown, APOZero
from rlhf.ops.preference_free import OddsRatio, SimPO, log1mexp, log_odds
from rlhf.ops.preference_sorted import AOT, AOTUnpaired

SIGMOID = {2.0: 1 / (1 + np.exp(-2.0)), 1.0: 1 / (1 + np.exp(-1.0)), 0.5: 1 / (1 + np.exp(-0.5))}


def make_pairs(policy, reference=0.0, n_tokens=1.0, shift=0.0) -> Pairs:
    policy = jnp.asarray(policy, jnp.float32)
    reference = jnp.broadcast_to(jnp.asarray(reference, jnp.float32), policy.shape)
    n_tokens = jnp.broadcast_to(jnp.asarray(n_tokens, jnp.float32), policy.shape)
    return Pairs(
        policy=policy,
        reference=reference,
        scores=policy - reference,
        mean_logprobs=policy / n_tokens,
        n_tokens=n_tokens,
        reward_shift=jnp.full(policy.shape[0], shift),
    )


def test_sigmoid_with_label_smoothing_is_conservative_dpo():
    loss = Sigmoid(label_smoothing=0.1)(make_pairs([[1.5, -0.5]]), 0.5)  # margin 2, logit 1
    np.testing.assert_allclose(loss, [0.9 * np.log1p(np.exp(-1)) + 0.1 * np.log1p(np.exp(1))], rtol=1e-6)


def test_sigmoid_per_token_divides_each_answer_by_its_own_length():
    loss = Sigmoid(per_token=True)(make_pairs([[4.0, 3.0]], n_tokens=[[2.0, 6.0]]), 2.0)  # 2 (4/2 - 3/6) = 3
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-3))], rtol=1e-6)


def test_robust_is_unbiased():
    """The mean over clean (1 - e) and flipped (e) labels is the loss on clean labels (its defining property)."""
    clean, flipped = make_pairs([[1.5, -0.5]]), make_pairs([[-0.5, 1.5]])
    robust = Robust(label_smoothing=0.2)
    mean = 0.8 * robust(clean, 0.7) + 0.2 * robust(flipped, 0.7)
    np.testing.assert_allclose(mean, Sigmoid()(clean, 0.7), rtol=1e-5)


def test_hinge_is_flat_beyond_its_margin():
    loss = Hinge()(make_pairs([[1.0, -1.0], [3.0, -3.0]]), 0.25)
    np.testing.assert_allclose(loss, [0.5, 0.0])


@pytest.mark.parametrize(("per_token", "expected"), [(True, (1.0 - 5.0) ** 2), (False, (3.0 - 5.0) ** 2)])
def test_ipo_mean_and_sum_forms(per_token, expected):
    loss = IPO(per_token=per_token)(make_pairs([[2.0, -1.0]], n_tokens=[[4.0, 2.0]]), 0.1)
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_exo_is_zero_where_the_policy_agrees_with_the_smoothed_label():
    margin = np.log(0.9 / 0.1)  # sigmoid of it is 0.9
    np.testing.assert_allclose(EXO(label_smoothing=0.1)(make_pairs([[margin, 0.0]]), 1.0), [0.0], atol=1e-6)


def test_exo_at_zero_margin():
    expected = -np.log(2) - 0.5 * np.log(0.999) - 0.5 * np.log(0.001)
    np.testing.assert_allclose(EXO(label_smoothing=1e-3)(make_pairs([[0.0, 0.0]]), 0.1), [expected], rtol=1e-6)


def test_discopop_by_hand():
    logistic, exponential = np.log1p(np.exp(-1.0)), np.exp(-1.0)
    share = SIGMOID[2.0]  # logit 1 at temperature 0.5
    loss = DiscoPOP(temperature=0.5)(make_pairs([[1.0, -1.0]]), 0.5)
    np.testing.assert_allclose(loss, [(1 - share) * logistic + share * exponential], rtol=1e-6)


def test_nca_by_hand():
    loss = NCA()(make_pairs([[2.0, -1.0]]), 0.5)  # rewards 1 and -0.5
    expected = np.log1p(np.exp(-1)) + 0.5 * np.log1p(np.exp(1)) + 0.5 * np.log1p(np.exp(-0.5))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_bco_compares_with_the_shift():
    loss = BCO()(make_pairs([[2.0, 0.0]], shift=0.5), 0.5)  # rewards 1 and 0 around 0.5
    np.testing.assert_allclose(loss, [2 * np.log1p(np.exp(-0.5))], rtol=1e-6)


def test_sppo_aims_at_plus_and_minus_half_over_beta():
    np.testing.assert_allclose(SPPO()(make_pairs([[5.0, -5.0], [0.0, 0.0]]), 0.1), [0.0, 50.0])


def test_apo_by_hand():
    pairs = make_pairs([[2.0, 0.0]])
    np.testing.assert_allclose(APOZero()(pairs, 0.5), [1 - SIGMOID[1.0] + 0.5], rtol=1e-6)
    np.testing.assert_allclose(APODown()(pairs, 0.5), [SIGMOID[1.0] + 1 - SIGMOID[1.0]], rtol=1e-6)


def test_aot_sorts_policy_and_reference_ratios_apart():
    pairs = make_pairs([[3.0, 0.0], [1.0, 0.0]], reference=[[0.0, 0.0], [2.0, 0.0]])  # ratios 3, 1 against 0, 2
    np.testing.assert_allclose(AOT()(pairs, 1.0), [np.log1p(np.exp(-1)), np.log1p(np.exp(-1))], rtol=1e-6)


def test_aot_unpaired_sorts_chosen_and_rejected_apart():
    pairs = make_pairs([[3.0, 0.0], [1.0, 2.0]])  # chosen 1, 3 against rejected 0, 2
    np.testing.assert_allclose(AOTUnpaired()(pairs, 1.0), [np.log1p(np.exp(-1)), np.log1p(np.exp(-1))], rtol=1e-6)


def test_simpo_subtracts_gamma_after_beta():
    loss = SimPO(gamma=0.5)(make_pairs([[-0.5, -1.25]]), 2.0)  # 2 · 0.75 - 0.5 = 1
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-1))], rtol=1e-6)


def test_odds_ratio_by_hand():
    pairs = make_pairs(np.log([[0.8, 0.5]]))  # odds 4 and 1
    np.testing.assert_allclose(OddsRatio()(pairs, 0.1), [0.1 * np.log(1 + 1 / 4)], rtol=1e-5)


def test_mixture_is_the_weighted_sum_and_names_its_parts():
    mixture, pairs = (
        Mixture(losses=[Sigmoid(), BCO(), Sigmoid(per_token=True)], weights=[0.8, 0.2, 1]),
        make_pairs([[1, 0]]),
    )
    parts = mixture.parts(pairs, 0.5)
    assert list(parts) == ["sigmoid", "bco", "sigmoid.2"]
    np.testing.assert_allclose(mixture(pairs, 0.5), 0.8 * parts["sigmoid"] + 0.2 * parts["bco"] + parts["sigmoid.2"])
    assert mixture.needs_reward_shift
    assert not mixture.needs_whole_batch


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(losses=[Sigmoid()], weights=[1.0, 2.0]), "1 entries and weights 2"),
        (lambda: Mixture(losses=[], weights=[]), "at least one loss"),
        (lambda: Sigmoid(label_smoothing=0.6), "label_smoothing=0.6 of Sigmoid must be at least 0 and at most 0.5"),
        (lambda: Robust(label_smoothing=0.5), "label_smoothing=0.5 of Robust must be at least 0 and at most 0.49"),
        (lambda: EXO(label_smoothing=0), "label_smoothing=0 of EXO must be .*above 0"),
        (lambda: DiscoPOP(temperature=0.0), "temperature=0.0 of DiscoPOP must be above 0"),
        (lambda: AlphaDivergence(alpha=0.0), "alpha=0.0 of AlphaDivergence must be"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


EXTREMES = make_pairs([[300.0, -300.0], [-300.0, 300.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    "preference",
    [
        Sigmoid(),
        Robust(),
        Hinge(),
        IPO(),
        EXO(),
        DiscoPOP(),
        NCA(),
        BCO(),
        SPPO(),
        APOZero(),
        APODown(),
        AOT(),
        SimPO(),
    ],
    ids=lambda p: type(p).__name__,
)
def test_extreme_log_ratios_give_finite_losses_and_gradients(preference):
    def total(policy):
        return jnp.sum(preference(make_pairs(policy), 1.0))

    value, gradient = jax.value_and_grad(total)(EXTREMES.policy)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("logprob", [-200.0, -20.0, -1.0, -np.log(2), -0.5, -1e-3, -1e-5])
def test_log1mexp_is_exact(logprob):
    exact = np.log(-np.expm1(np.float64(logprob)))
    np.testing.assert_allclose(log1mexp(jnp.float32(logprob)), exact, rtol=2e-6, atol=1e-30)
    slope = -np.exp(np.float64(logprob)) / -np.expm1(np.float64(logprob))
    np.testing.assert_allclose(jax.grad(lambda x: log1mexp(x))(jnp.float32(logprob)), slope, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("logprob", [0.0, -1e-12, -1e-8])
def test_the_odds_of_a_certain_answer_are_large_and_their_gradient_is_finite(logprob):
    value, slope = jax.value_and_grad(log_odds)(jnp.float32(logprob))
    np.testing.assert_allclose(value, -np.log(1e-6), rtol=1e-3)
    np.testing.assert_allclose(slope, 1.0)


@pytest.mark.parametrize(
    ("divergence", "slope_of_f"),
    [
        (ReverseKL(), lambda u: np.log(u)),
        (ForwardKL(), lambda u: 1 - 1 / u),
        (JensenShannon(), lambda u: np.log(2 * u / (1 + u))),
        (AlphaDivergence(alpha=0.3), lambda u: (1 - u**-0.3) / 0.3),
    ],
    ids=lambda d: type(d).__name__,
)
def test_divergences_are_the_slope_of_f(divergence, slope_of_f):
    """Table 1 of Wang et al. (2024), shifted to 0 at u = 1."""
    ratio = np.array([[0.2, 0.9], [1.0, 3.0]])
    np.testing.assert_allclose(divergence(jnp.log(ratio)), slope_of_f(ratio), rtol=1e-5, atol=1e-6)
    assert float(divergence(jnp.zeros((1, 2)))[0, 0]) == pytest.approx(0, abs=1e-7)


def test_alpha_divergence_goes_from_reverse_to_forward_kl():
    ratios = jnp.array([[-1.0, 0.5]])
    np.testing.assert_allclose(AlphaDivergence(alpha=1.0)(ratios), ForwardKL()(ratios), rtol=1e-6)
    np.testing.assert_allclose(AlphaDivergence(alpha=1e-4)(ratios), ReverseKL()(ratios), rtol=1e-3)


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(), AlphaDivergence(alpha=1.0)])
def test_divergences_stay_finite_far_from_the_reference(divergence):
    def squared(ratios):
        return jnp.sum(divergence(ratios) ** 2)  # IPO squares them

    value, gradient = jax.value_and_grad(squared)(jnp.array([[-500.0, 500.0]]))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
