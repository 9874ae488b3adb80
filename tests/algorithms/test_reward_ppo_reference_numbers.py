"""Reward models and PPO against a reference implementation's numbers: losses, metrics, advantages and gradients.

Where that implementation differs: it adds an answer's score to the token behind the last one, where there is room, and
trains a value there; here the score is the last token's. Its masks are given to the same functions.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import SHARED_LOSSES

from rlhf.algorithms.critic import Critic
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.reward_model import RewardModel
from rlhf.ops.gae import generalized_advantage, token_rewards, whiten
from rlhf.ops.kl import ESTIMATORS
from rlhf.ops.policy import Clipped
from rlhf.ops.weights import PerToken

EXPECTED = json.loads((SHARED_LOSSES / "expected.json").read_text()) if SHARED_LOSSES.exists() else {}
HEAD = {"weight": jnp.ones(1), "bias": jnp.float32(0), "scale": jnp.float32(1)}
SETTINGS = {"learning_rate": 1e-6, "batch_size": 4, "microbatch_size": 4}


def cases(group: str) -> list:
    found = [pytest.param(case, id=str(number)) for number, case in enumerate(EXPECTED.get(group, {}).get("cases", []))]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="needs the folder `shared` beside the checkout"))]


def test_all_cases_are_there():
    assert not EXPECTED or (len(EXPECTED["reward"]["cases"]), len(EXPECTED["ppo"]["cases"])) == (6, 5)


@pytest.fixture(scope="module")
def inputs(shared):
    return dict(np.load(shared / "fixtures/losses/inputs.npz"))


class Tables:
    """A model whose log-probabilities and hidden states (of width 1) are looked up by token."""

    def token_logprobs(self, params, batch, temperature=1.0):
        return params["model"]["logprobs"][batch["tokens"]]

    def hidden_of(self, params, batch):
        tokens = jnp.asarray(batch["tokens"])
        return params["model"]["hidden"][tokens.reshape(-1, tokens.shape[-1])][..., None]


@pytest.mark.parametrize("case", cases("reward"))
def test_reward_model(case, inputs):
    """Every sequence is one token, whose hidden state is the score."""
    algorithm = RewardModel(
        **SETTINGS, margin=1.0 if case["margin"] else 0.0, centering=case["center_rewards_coefficient"] or 0.0
    )
    batch = {
        "tokens": np.arange(8, dtype=np.int32).reshape(2, 4).T[..., None],  # chosen 0 to 3, rejected 4 to 7
        "is_answer": np.ones((4, 2, 1), bool),
        "value": inputs["reward_margin"],
        "row": np.arange(4, dtype=np.int32),
    }

    def loss(scores):
        params = {"model": {"hidden": scores}, "head": HEAD}
        return algorithm.loss(Tables(), params, algorithm.prepare(None, params, batch, jax.random.key(0)))

    (found, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(inputs["reward_scores"]))
    np.testing.assert_allclose(found, case["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, case["grad"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        metrics["rewards/accuracies"], case["metrics"]["accuracy"] + 0.125
    )  # a tie is half right
    np.testing.assert_allclose(metrics["rewards/margins"], case["metrics"]["margin"], rtol=1e-6)


def masks(inputs) -> tuple[np.ndarray, np.ndarray]:
    """Answer tokens, and these with the place behind the last."""
    place, last = np.arange(10), inputs["ppo_last_index"][:, None]
    return place <= last, place <= last + 1


def advantages_of(case, inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token rewards, advantages and returns, made by the functions that PPO's `prepare` uses."""
    is_answer, is_valued = masks(inputs)
    log_ratio = (inputs["ppo_old_logps"] - inputs["ppo_ref_logps"]) * is_answer
    penalty = case["kl_coef"] * np.asarray(ESTIMATORS[case["kl_estimator"]](log_ratio)) * is_answer
    rewards = token_rewards(inputs["ppo_scores"], penalty, is_valued)
    if case["whiten_rewards"]:
        rewards = whiten(rewards, is_valued, keep_mean=True)
    values = np.where(is_valued, inputs["ppo_values"], 0)
    plain = generalized_advantage(rewards, values, is_valued, case["gamma"], case["lam"])
    return rewards, plain, plain + values


@pytest.mark.parametrize("case", cases("ppo"))
def test_ppo_advantages(case, inputs):
    is_answer, is_valued = masks(inputs)
    rewards, plain, returns = advantages_of(case, inputs)
    np.testing.assert_allclose(rewards, case["rewards"], atol=2e-6)
    np.testing.assert_allclose(np.where(is_answer, plain, 0), case["advantages_unwhitened"], atol=2e-6)
    np.testing.assert_allclose(whiten(plain, is_answer), case["advantages"], atol=2e-6)
    np.testing.assert_allclose(returns[is_valued], np.array(case["returns"])[is_valued], atol=2e-6)


@pytest.mark.parametrize("case", cases("ppo"))
def test_ppo_loss(case, inputs, shared):
    """The first place of a row is the prompt's; the value at a place is read from the hidden state before it."""
    is_answer, is_valued = masks(inputs)
    _, plain, returns = advantages_of(case, inputs)
    algorithm = PPO(
        **SETTINGS,
        policy=Clipped(low=case["cliprange"], high=case["cliprange"]),
        critic=Critic(loss_weight=case["vf_coef"], clip=case["cliprange_value"]),
    )

    def shifted(values):
        return np.pad(np.where(is_valued, values, 0).astype(np.float32), ((0, 0), (1, 0)))

    batch = {
        "tokens": np.arange(66, dtype=np.int32).reshape(6, 11),
        "is_answer": np.pad(is_answer, ((0, 0), (1, 0))),
        "advantages": shifted(whiten(plain, is_answer)),
        "old_logprobs": shifted(inputs["ppo_old_logps"]),
        "sampler_logprobs": shifted(inputs["ppo_old_logps"]),
        "old_values": shifted(inputs["ppo_values"]),
        "returns": shifted(returns),
    }
    batch["token_weight"] = PerToken()(batch["is_answer"])
    hidden = np.pad(inputs["ppo_new_values"], ((0, 0), (0, 1)))

    def loss(tables, weight):
        policy, critic = {"logprobs": tables[0]}, {"model": {"hidden": tables[1]}, "head": HEAD}
        params = {"model": policy, "critic": critic}
        return algorithm.loss(Tables(), params, jax.tree.map(jnp.asarray, {**batch, "weight": PerToken()(weight)}))

    tables = (jnp.asarray(shifted(inputs["ppo_new_logps"]).ravel()), jnp.asarray(hidden.ravel()))
    # the policy's mean is over answer tokens, the critic's over one more place a row
    (_, of_policy), (d_logprobs, _) = jax.value_and_grad(loss, has_aux=True)(tables, batch["is_answer"])
    (_, of_critic), (_, d_hidden) = jax.value_and_grad(loss, has_aux=True)(tables, np.pad(is_valued, ((0, 0), (1, 0))))
    np.testing.assert_allclose(of_policy["policy/loss"], case["pg_loss"], atol=1e-6)
    np.testing.assert_allclose(of_critic["value/loss"], case["vf_loss"], rtol=1e-5)
    total = of_policy["policy/loss"] + case["vf_coef"] * of_critic["value/loss"]
    np.testing.assert_allclose(total, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(of_critic["value/clipfrac"], case["vf_clipfrac"], atol=1e-6)
    grads = np.load(shared / "fixtures/losses/grads.npz")
    name = case["id"].replace("/", "|")
    np.testing.assert_allclose(d_logprobs.reshape(6, 11)[:, 1:], grads[f"{name}|d_logps"], atol=1e-6)
    np.testing.assert_allclose(d_hidden.reshape(6, 11)[:, :-1], grads[f"{name}|d_values"], atol=1e-6)
