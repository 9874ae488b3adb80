"""The DPO algorithm: what it refuses, what it remembers, what it asks the model for."""

import dataclasses

import jax
import numpy as np
import pytest
from table_model import MODEL, TableModel, random_batch, random_params, runtime

from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.reference import NoReference
from rlhf.errors import ConfigError
from rlhf.ops.divergence import ForwardKL
from rlhf.ops.pair_weights import WPO
from rlhf.ops.pooling import LengthDesensitized, Mean
from rlhf.ops.preference import IPO, Hinge, Mixture, Sigmoid
from rlhf.ops.preference_absolute import BCO
from rlhf.ops.preference_free import OddsRatio
from rlhf.ops.preference_sorted import AOT
from rlhf.ops.weights import PerSequence

SETTINGS = {"learning_rate": 1e-6, "batch_size": 8, "microbatch_size": 8}
POLICY, REFERENCE = random_params(1), random_params(2)
BATCH = random_batch(5, (8, 2, 12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"preference": AOT(), "microbatch_size": 4},
            r"algorithm.microbatch_size=4 must be 8 \(batch_size 8 / minibatches 1\): algorithm.preference=AOT",
        ),
        (
            {"preference": AOT(), "minibatches": 2, "microbatch_size": 2},
            r"algorithm.microbatch_size=2 must be 4 \(batch_size 8 / minibatches 2\)",
        ),
        (
            {"preference": Mixture(losses=[Sigmoid(), AOT()], weights=[1, 1]), "microbatch_size": 4},
            "algorithm.preference=Mixture compares all pairs",
        ),
        (
            {"preference": AOT(), "divergence": ForwardKL()},
            "algorithm.divergence=ForwardKL has no effect on algorithm.preference=AOT",
        ),
        ({"preference": OddsRatio()}, "algorithm.reference=Frozen has no effect on algorithm.preference=OddsRatio"),
        (
            {"preference": BCO(), "reference": NoReference()},
            "algorithm.reference=NoReference: algorithm.preference=BCO compares rewards with a running mean",
        ),
        ({"reference": NoReference(), "divergence": ForwardKL()}, "algorithm.divergence=ForwardKL is from a reference"),
        (
            {"preference": AOT(), "weighting": WPO()},
            "algorithm.weighting=WPO weighs pairs, and .*=AOT",
        ),
        (
            {"preference": OddsRatio(), "reference": NoReference(), "pooling": LengthDesensitized()},
            "algorithm.pooling=LengthDesensitized has no effect on algorithm.preference=OddsRatio",
        ),
        ({"preference": IPO(), "pooling": Mean()}, "algorithm.pooling=Mean is per token already"),
        (
            {"preference": Mixture(losses=[Hinge(), Sigmoid(per_token=True)], weights=[1, 1]), "pooling": Mean()},
            "algorithm.pooling=Mean is per token already, and algorithm.preference=Mixture divides",
        ),
        ({"beta": 0.0}, "beta=0.0 of DPO must be above 0"),
        ({"sft_weight": -1.0}, "sft_weight=-1.0 of DPO must be at least 0"),
    ],
)
def test_impossible_combinations_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DPO(**{**SETTINGS, **settings})


def test_one_forward_pass_scores_both_answers():
    calls = []

    class Counting(TableModel):
        def token_logprobs(self, params, batch, temperature=1.0):
            calls.append(batch["tokens"].shape)
            return super().token_logprobs(params, batch)

    dpo = DPO(**SETTINGS, reference=NoReference())
    dpo.loss(Counting(), POLICY, dpo.prepare(runtime(REFERENCE), POLICY, BATCH, jax.random.key(0)))
    assert calls == [(8, 2, 12)]


def test_statistics_are_asked_for_only_where_they_are_used():
    class WithoutStatistics(TableModel):
        def token_statistics(self, params, batch, temperature=1.0):
            raise AssertionError("costs a second pass over the vocabulary")

    for weighting in (WPO(aligned=False), DPO(**SETTINGS).weighting):
        dpo = DPO(**SETTINGS, weighting=weighting)
        dpo.loss(WithoutStatistics(), POLICY, dpo.prepare(runtime(REFERENCE), POLICY, BATCH, jax.random.key(0)))
    dpo = DPO(**SETTINGS, weighting=WPO())
    with pytest.raises(AssertionError, match="second pass"):
        dpo.loss(WithoutStatistics(), POLICY, dpo.prepare(runtime(REFERENCE), POLICY, BATCH, jax.random.key(0)))


def test_the_sft_term_can_weigh_every_answer_the_same():
    def nll(**settings):
        dpo = DPO(**SETTINGS, **settings, sft_weight=1.0)
        return dpo.loss(MODEL, POLICY, dpo.prepare(runtime(REFERENCE), POLICY, BATCH, jax.random.key(0)))[1]["nll"]

    logprobs = np.asarray(MODEL.token_logprobs(POLICY, BATCH))[:, 0]
    is_answer = BATCH["is_answer"][:, 0]
    np.testing.assert_allclose(nll(), -logprobs[is_answer].mean(), rtol=1e-6)
    means = [row[mask].mean() for row, mask in zip(logprobs, is_answer, strict=True)]
    np.testing.assert_allclose(nll(sft_weighting=PerSequence()), -np.mean(means), rtol=1e-6)


def test_bco_shifts_by_the_mean_reward_of_earlier_batches():
    dpo, run = DPO(**SETTINGS, beta=0.5, preference=BCO()), runtime(REFERENCE, rows=3)
    batches = [random_batch(seed, (8, 2, 12)) for seed in (5, 6, 7)]
    shifts = [dpo.prepare(run, POLICY, batch, jax.random.key(0))["reward_shift"] for batch in batches]
    rewards = []
    for batch in batches:
        ratios = MODEL.token_logprobs(POLICY, batch) - MODEL.token_logprobs(REFERENCE, batch)
        rewards.append(0.5 * np.sum(ratios * batch["is_answer"], axis=-1).mean())
    np.testing.assert_array_equal(shifts[0], np.zeros(8))
    np.testing.assert_allclose(shifts[1], np.full(8, rewards[0]), rtol=1e-5)
    np.testing.assert_allclose(shifts[2], np.full(8, np.mean(rewards[:2])), rtol=1e-5)
    np.testing.assert_allclose(run.memory["reward_mean"], np.mean(rewards), rtol=1e-5)


def test_bco_without_shift_remembers_nothing():
    dpo, run = DPO(**SETTINGS, preference=BCO(shifted=False)), runtime(REFERENCE)
    assert "reward_shift" not in dpo.prepare(run, POLICY, BATCH, jax.random.key(0))
    assert run.memory == {}


def test_evaluation_on_a_copy_of_the_memory_leaves_training_alone():
    dpo, run = DPO(**SETTINGS, preference=BCO()), runtime(REFERENCE)
    dpo.prepare(run, POLICY, BATCH, jax.random.key(0))
    before = dict(run.memory)
    dpo.prepare(
        dataclasses.replace(run, memory=dict(run.memory)), POLICY, random_batch(9, (8, 2, 12)), jax.random.key(0)
    )
    assert {name: float(value) for name, value in run.memory.items()} == {n: float(v) for n, v in before.items()}


def test_prepare_leaves_the_batch_it_is_given_alone():
    batch = dict(BATCH)
    DPO(**SETTINGS).prepare(runtime(REFERENCE), POLICY, batch, jax.random.key(0))
    assert set(batch) == set(BATCH)


def test_without_reference_none_is_asked():
    dpo = DPO(**SETTINGS, preference=Hinge(), reference=NoReference())
    assert not dpo.needs_reference
    prepared = dpo.prepare(dataclasses.replace(runtime(REFERENCE), reference=None), POLICY, BATCH, jax.random.key(0))
    assert "reference_logprobs" not in prepared


def test_a_step_learns_the_preferences():
    """Plain gradient descent on the table: the margin of every pair whose answers differ becomes positive."""
    dpo = DPO(**SETTINGS, beta=0.5)
    prepared = dpo.prepare(runtime(REFERENCE), REFERENCE, BATCH, jax.random.key(0))
    step = jax.jit(jax.grad(lambda params: dpo.loss(MODEL, params, prepared)[0]))
    params = REFERENCE
    for _ in range(200):
        params = jax.tree.map(lambda p, g: p - 2.0 * g, params, step(params))
    loss, metrics = dpo.loss(MODEL, params, prepared)
    assert loss < 0.1
    assert metrics["rewards/accuracies"] == 1.0


def test_the_padding_of_a_batch_changes_nothing():
    dpo = DPO(**SETTINGS)
    wider = {name: np.pad(x, ((0, 0), (0, 0), (0, 5))) if x.ndim == 3 else x for name, x in BATCH.items()}
    losses = [
        dpo.loss(MODEL, POLICY, dpo.prepare(runtime(REFERENCE), POLICY, batch, jax.random.key(0)))[0]
        for batch in (BATCH, wider)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
