"""Rejection-sampling fine-tuning and online DPO on a policy that is a table; and what all online yamls keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bandit import MODEL, batch, runtime
from test_algorithm_yamls import FOLDER, build

from rlhf.algorithms.online_dpo import OnlineDPO
from rlhf.algorithms.rft import RFT
from rlhf.errors import ConfigError
from rlhf.ops.preference_sorted import AOT

KEY = jax.random.key(0)
PARAMS = {"model": jnp.array([0.5, 0.0, 1.0, -1.0])}
OTHER = np.array([0.0, 0.4, -0.2, 0.1], np.float32)
SETTINGS = {"learning_rate": 1e-3, "batch_size": 4, "microbatch_size": 4, "max_new_tokens": 4}


def by_text(answer) -> float:
    return float(answer.completion.count("2"))


def prepared(algorithm, rt, params=PARAMS):
    made = algorithm.prepare(rt, params, batch(0, 1, 2, 3), KEY)
    return {name: jnp.asarray(value) for name, value in made.items()}


def words_of(made, row) -> list[int]:
    return np.asarray(made["tokens"][row])[np.asarray(made["is_answer"][row])].tolist()


def test_rft_imitates_the_best_of_each_group_once():
    algorithm = RFT(**SETTINGS, group_size=8, n_best=2)
    rt = runtime(by_text)
    made = prepared(algorithm, rt)
    assert made["tokens"].shape[0] == algorithm.rows_per_batch == 8
    for row in range(4):
        texts = [shown["text"] for shown in rt.log.rollouts if shown["row"] == row]
        best = sorted({(text.count("2"), text) for text in texts}, reverse=True)[:2]
        kept = [" ".join(map(str, words_of(made, 2 * row + place))) for place in (0, 1)]
        assert [text.count("2") for text in kept] == [count for count, _ in best]
        assert len(set(kept)) == 2
    loss, metrics = algorithm.loss(MODEL, PARAMS, made)
    logprobs = np.asarray(jax.nn.log_softmax(PARAMS["model"]))
    words = [word for row in range(8) for word in words_of(made, row)]
    np.testing.assert_allclose(loss, -logprobs[words].mean(), rtol=1e-6)
    assert metrics["nll"] == loss


def test_rft_leaves_out_what_is_not_good_enough():
    rt = runtime(lambda answer: None if answer.row == 3 else by_text(answer) if answer.row else 0.0)
    algorithm = RFT(**SETTINGS, group_size=8, n_best=8, least_reward=1.0)
    made = prepared(algorithm, rt)
    counts = np.asarray(made["weight"].sum(axis=1) > 0).reshape(4, 8)
    assert not counts[0].any()
    assert not counts[3].any()
    assert counts[1:3].any()
    for row in np.flatnonzero(counts.ravel()):
        assert 2 in words_of(made, row)
    np.testing.assert_allclose(made["weight"].sum(), 32, rtol=1e-5)
    assert rt.log.metrics["answers/kept"] == counts.mean()
    assert rt.log.metrics["reward/kept_mean"] >= 1


def test_online_dpo_pairs_the_best_with_the_worst():
    algorithm = OnlineDPO(**SETTINGS, group_size=4, beta=0.5, sft_weight=0.1)
    rt = runtime(lambda answer: 1.0 if answer.row == 1 else by_text(answer), reference=OTHER)
    made = prepared(algorithm, rt)
    assert made["tokens"].shape == (4, 2, 8)
    np.testing.assert_allclose(made["pair_weight"], [4 / 3, 0, 4 / 3, 4 / 3], rtol=1e-6)
    policy, reference = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (PARAMS["model"], OTHER))
    losses, logps = [], []
    for row in (0, 2, 3):
        sides = [np.asarray(made["tokens"][row, side])[np.asarray(made["is_answer"][row, side])] for side in (0, 1)]
        counts = [row_["reward"] for row_ in rt.log.rollouts if row_["row"] == row]
        assert [int((side == 2).sum()) for side in sides] == [max(counts), min(counts)]
        ratios = [(policy[side] - reference[side]).sum() for side in sides]
        losses.append(np.log1p(np.exp(-0.5 * (ratios[0] - ratios[1]))))
        logps += policy[sides[0]].tolist()
    loss, metrics = algorithm.loss(MODEL, PARAMS, made)
    np.testing.assert_allclose(loss, np.mean(losses) - 0.1 * np.mean(logps), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], -np.mean(logps), rtol=1e-5)


def test_online_dpo_begins_at_ln_2():
    rt = runtime(by_text, reference=np.asarray(PARAMS["model"]))
    algorithm = OnlineDPO(**SETTINGS)
    loss, metrics = algorithm.loss(MODEL, PARAMS, prepared(algorithm, rt))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/accuracies"], 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RFT(**SETTINGS, group_size=2, n_best=3), "algorithm.n_best=3 must be at most algorithm.group_size=2"),
        (lambda: OnlineDPO(**SETTINGS, group_size=1), "algorithm.group_size=1 must be at least 2: pairs are made"),
        (lambda: OnlineDPO(**SETTINGS, preference=AOT()), "algorithm.preference=AOT compares pairs with others"),
    ],
)
def test_settings_that_can_not_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


ONLINE = [path for path in sorted(FOLDER.glob("*.yaml")) if build(path).form == "prompt" and path.stem != "ppo"]


@jax.jit
def gradient(algorithm, made):
    return jax.grad(lambda p: algorithm.loss(MODEL, p, made)[0])(PARAMS)["model"]


@pytest.mark.parametrize("path", ONLINE, ids=lambda path: path.stem)
def test_minibatches_have_the_mean_gradient_of_the_whole_batch(path):
    """Whichever mean the loss takes: weights are made of the whole batch."""
    settings = {**SETTINGS, "microbatch_size": 1, "minibatches": 1}
    settings["group_size"] = {"reinforce_pp": 1, "online_dpo": 2}.get(path.stem, 4)
    algorithm = build(path, **settings, **({"truncation": {"buffer": 2}} if path.stem == "dapo" else {}))
    made = prepared(algorithm, runtime(by_text, reference=OTHER))
    n_rows = algorithm.rows_per_batch
    assert len(made["row"]) == n_rows
    half = [gradient(algorithm, {k: v[part] for k, v in made.items()}) for part in (slice(0, 2), slice(2, 4))]
    rest = [gradient(algorithm, {k: v[at : at + 2] for k, v in made.items()}) for at in range(4, n_rows, 2)]
    whole = gradient(algorithm, made)
    assert jnp.abs(whole).sum() > 1e-4
    np.testing.assert_allclose(sum([*half, *rest]) / (n_rows / 2), whole, rtol=1e-4, atol=1e-6)
