"""The answers to a prompt in one row give what rows of their own give, in every number and gradient."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bandit import prompt, runtime

from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.reference import LiveReference
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.ops.kl import InLoss, InReward
from rlhf.ops.policy import AnswerRatio
from rlhf.train.minibatches import minibatches
from rlhf.train.update import loss_and_gradient

MODEL = Gemma3(Architecture(16, 32, 48, 2, 2, 1, 16, 0.25, 8, pattern=2))
POLICY, REFERENCE = ({"model": jax.device_put(MODEL.initialise(seed), may_alias=False)} for seed in (0, 1))
TABLE = {"model": jnp.array([0.5, 0.0, 1.0, -1.0])}  # what the answers are drawn from
GRADIENT = jax.jit(loss_and_gradient, static_argnums=4)
SETTINGS = {"learning_rate": 1e-3, "batch_size": 4, "group_size": 4, "max_new_tokens": 4, "microbatch_size": 8}


def prepared(algorithm, n_row_shards=1):
    """Prompts of 11 to 14 tokens, answers of 1 to 3."""
    rt = runtime(lambda answer: float(answer.completion.count("2")))
    prompts = [prompt(row, 11 + row) for row in range(4)]
    rt.prompts = SimpleNamespace(prompts=prompts, pad=0, n_slots=0)
    draw, rt.generate = rt.generate, lambda params, *rest, **more: draw(TABLE, *rest, **more)
    rt.generate.settings, rt.generate.shapes = draw.settings, draw.shapes
    rt.model, rt.n_row_shards = MODEL, n_row_shards
    rt.reference = LiveReference(MODEL, REFERENCE, algorithm.microbatch_size)
    batch = {"prompts": prompts, "row": np.arange(4, dtype=np.int32)}
    return algorithm.prepare(rt, POLICY, batch, jax.random.key(0)), rt


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"minibatches": 2, "kl": InReward(coef=0.1), "ratio": AnswerRatio()},
        {"entropy_bonus": 0.1, "epochs": 2, "kl": InLoss(coef=0.1, importance_weighted=True)},
    ],
    ids=["plain", "ratios of answers, divergence in the reward", "entropy"],
)
def test_the_same_loss_metrics_and_gradient(changes):
    algorithm = GRPO(**SETTINGS, **changes)
    together = prepared(algorithm)[0]
    apart = prepared(algorithm, n_row_shards=4)[0]  # two groups at once can't be split over four devices
    assert together["joint_tokens"].shape == (4, 32)
    assert together["tokens"].shape == (4, 4, 24)
    assert apart["tokens"].shape == (16, 24)
    assert "joint_tokens" not in apart
    names = set(apart) - {"tokens", "segments", "positions", "is_answer", "row", "scored"}
    for name in names | set(apart):
        np.testing.assert_allclose(together[name].reshape(apart[name].shape), apart[name], atol=1e-5, err_msg=name)
    (one, gradient), (other, expected) = (GRADIENT(POLICY, {}, batch, algorithm, MODEL) for batch in (together, apart))
    for name, value in other.items():
        np.testing.assert_allclose(one[name], value, atol=2e-5, rtol=1e-5, err_msg=name)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert largest > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(largest, 1)), gradient, expected)


def test_minibatches_have_whole_groups_and_microbatches_as_many_answers():
    algorithm = GRPO(**SETTINGS | {"microbatch_size": 4}, minibatches=2)
    batch, _ = prepared(algorithm)
    parts = list(minibatches(batch, algorithm, jax.random.key(0), is_noisy=True))
    assert [part["tokens"].shape for part in parts] == [(2, 4, 24)] * 2
    assert sorted(row for part in parts for row in part["row"][:, 0].tolist()) == [0, 1, 2, 3]
    assert all((part["row"] == part["row"][:, :1]).all() for part in parts)
    assert [part["noise"].shape for part in parts] == [(2,)] * 2
    assert algorithm.rows_at_once(parts[0]) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"microbatch_size": 2},  # less than a group
        {"max_new_tokens": 64},  # the prompt is nothing beside the answers
        {"group_size": 1, "batch_size": 16},
    ],
    ids=["small microbatches", "long answers", "one answer each"],
)
def test_rows_of_their_own_where_one_would_not_pay(changes):
    algorithm = GRPO(**SETTINGS | changes, **({"advantage": _plain()} if "group_size" in changes else {}))
    if "group_size" in changes:
        algorithm = dataclasses.replace(algorithm, batch_size=4, microbatch_size=4)
    batch, _ = prepared(algorithm)
    assert batch["tokens"].ndim == 2
    assert algorithm.rows_at_once(batch) == algorithm.microbatch_size


def _plain():
    from rlhf.ops.advantages import Plain

    return Plain()
