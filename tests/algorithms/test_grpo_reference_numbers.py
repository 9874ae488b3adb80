"""The GRPO family against a reference implementation's numbers: loss, gradient of each log-probability, advantages.

Every case is here. Where that implementation leaves the paper, the option that gives its number is taken and named:

- its divergence term is multiplied by the importance ratio (`importance_weighted`) unless the case says otherwise;
- its divergence metric is weighted so too, and its clip fractions count answers where the ratio is an answer's: ours
  count tokens, so metrics are compared where both mean the same;
- `acc2` is one of two microbatches of a batch: here the batch is made of both, and their mean is taken.
- `entropy0.01`: its entropies are constants there, and so they are of the model here; ours have a gradient.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import SHARED_LOSSES

from rlhf.algorithms.grpo import GRPO
from rlhf.ops.advantages import BatchScaled, GroupCentred, GroupNormalised, LeaveOneOut
from rlhf.ops.kl import InLoss
from rlhf.ops.logprobs import TokenStatistics
from rlhf.ops.policy import (
    AnswerRatio,
    Clipped,
    ClippedWeight,
    DualClipped,
    GammaWeight,
    NegativeMask,
    NoCorrection,
    SequenceRatio,
    SoftGate,
    TokenRatio,
    TruncatedImportance,
)
from rlhf.ops.token_choice import AllTokens, HighEntropy
from rlhf.ops.weights import PerConstant, PerSequence, PerToken

EXPECTED = json.loads((SHARED_LOSSES / "expected.json").read_text()) if SHARED_LOSSES.exists() else {}
WEIGHTINGS = {
    "grpo": PerSequence(),
    "sapo": PerSequence(),
    "dr_grpo": PerConstant(length=16),  # the longest answer that was allowed
    "luspo": PerConstant(length=1),  # each answer's loss times its length
}
SKIP = pytest.mark.skip(reason="needs the folder `shared` beside the checkout")


def cases(group: str, name: str = "cases") -> list:
    found = EXPECTED.get(group, {name: []})[name]
    return [pytest.param(case, id=case.get("id", str(i))) for i, case in enumerate(found)] or [
        pytest.param(None, marks=SKIP)
    ]


@pytest.fixture(scope="module")
def inputs(shared):
    return dict(np.load(shared / "fixtures/losses/inputs.npz"))


class Given:
    """A model whose parameters are the log-probabilities."""

    def token_logprobs(self, params, batch, temperature):
        return params

    def token_statistics(self, params, batch, temperature):
        return TokenStatistics(params, batch["sampler_entropy"], jnp.zeros_like(params))


def algorithm(case: dict) -> GRPO:
    kind, low, high = case["loss_type"], case.get("eps", 0.2), case.get("eps_high", 0.2)
    policy = {"cispo": ClippedWeight(largest=high), "sapo": SoftGate(), "vespo": GammaWeight()}.get(kind)
    if policy is None:
        policy = Clipped(low=low, high=high)
    if "delta" in case:
        policy = DualClipped(low=low, high=high, largest=case["delta"])
    correction = NegativeMask(threshold=case["off_policy"]) if "off_policy" in case else NoCorrection()
    return GRPO(
        learning_rate=1e-6,
        batch_size=2,
        group_size=4,
        microbatch_size=8,
        policy=policy,
        weighting=WEIGHTINGS.get(kind, PerToken()),
        ratio=SequenceRatio() if case.get("level") == "sequence" else TokenRatio(),
        kl=InLoss(coef=case.get("beta", 0.0), importance_weighted=case.get("bias_kl", True)),
        correction=TruncatedImportance(largest=case["vllm_is"]) if "vllm_is" in case else correction,
        tokens=HighEntropy(share=case["quantile"]) if "quantile" in case else AllTokens(),
        entropy_bonus=case.get("entropy_coef"),
    )


def batch_of(inputs, case: dict, grpo: GRPO) -> dict:
    is_answer = inputs["grpo_mask"] > 0
    if case.get("zero_row"):
        is_answer[1] = False
    whole = is_answer
    if "acc_steps" in case:  # the other microbatch has what is missing of the tokens
        rest = int(case.get("num_items", 2 * is_answer.sum()) - is_answer.sum())
        whole = np.concatenate([is_answer, (np.arange(8 * 12) < rest).reshape(8, 12)])
    batch = {
        "is_answer": is_answer,
        "sampler_logprobs": inputs["grpo_sampling_logps"],
        "sampler_entropy": inputs["grpo_entropy"],
        "advantages": inputs["grpo_advantages"][:, None] * is_answer,
        "weight": grpo.weighting(whole)[:8].astype(np.float32) * (8 / len(whole)),
        "token_weight": PerToken()(is_answer).astype(np.float32),
        "is_chosen": grpo.tokens(is_answer, inputs["grpo_entropy"]),
    }
    if case.get("old", True):
        batch["old_logprobs"] = inputs["grpo_old_logps"]
    if grpo.needs_reference:
        batch["reference_logprobs"] = inputs["grpo_ref_logps"]
    return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.mark.parametrize("case", cases("grpo"))
def test_loss_and_gradient(case, inputs, shared):
    grpo = algorithm(case)
    batch = batch_of(inputs, case, grpo)
    logprobs = jnp.asarray(inputs["grpo_logps"])
    (loss, metrics), gradient = jax.value_and_grad(lambda x: grpo.loss(Given(), x, batch), has_aux=True)(logprobs)
    np.testing.assert_allclose(loss, case["loss"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(jnp.abs(gradient)), case["grad_abs_sum"], rtol=1e-5)
    grads = np.load(shared / "fixtures/losses/grads.npz")
    if (name := case["id"].replace("/", "|")) in grads:
        np.testing.assert_allclose(gradient, grads[name], rtol=1e-4, atol=1e-7)
    if case.get("level", "token") == "token" and "clip_ratio/low_mean" in case["metrics"]:
        high = metrics["policy/clipfrac_high"]
        if "delta" not in case:
            np.testing.assert_allclose(high, case["metrics"]["clip_ratio/high_mean"], rtol=1e-5)
        np.testing.assert_allclose(metrics["policy/clipfrac_low"], case["metrics"]["clip_ratio/low_mean"], rtol=1e-5)
    if case.get("bias_kl") is False or not case.get("old", True):
        np.testing.assert_allclose(metrics["kl/k3"], case["metrics"]["kl"], rtol=1e-5)


def test_all_cases_are_there():
    if EXPECTED:
        assert [len(EXPECTED["grpo"][name]) for name in ("cases", "advantages")] == [58, 8]
        assert len(EXPECTED["rloo"]["cases"]) == 8


ADVANTAGES = {"group": GroupNormalised(), "batch": BatchScaled(), "none": GroupCentred()}


@pytest.mark.parametrize("case", cases("grpo", "advantages"))
def test_advantages(case, inputs):
    """A reward that could not tell (NaN) counts 0 there; an answer that none could judge is not valid."""
    rewards, weights = inputs[case["rewards"]], np.array(case["weights"])
    is_valid = ~np.isnan(rewards).all(axis=1).reshape(-1, 4)
    advantage = ADVANTAGES[case["scale_rewards"]]
    if case["multi_objective_aggregation"] == "sum_then_normalize":
        found = advantage(np.nansum(rewards * weights, axis=1).reshape(-1, 4), is_valid)
    else:
        parts = [GroupNormalised()(part.reshape(-1, 4), ~np.isnan(part).reshape(-1, 4)) for part in rewards.T]
        total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        deviation = total[is_valid].std(ddof=1)
        found = np.where(is_valid, (total - total[is_valid].mean()) / (deviation + 1e-4), 0)
    np.testing.assert_allclose(found.ravel(), case["advantages"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", cases("rloo"))
def test_rloo(case, inputs):
    is_answer = inputs["grpo_mask"] > 0
    total = (inputs["grpo_rewards_per_func"] * np.array(case["weights"])).sum(axis=1)
    if case["reward_clip_range"] is not None:
        total = np.clip(total, *case["reward_clip_range"])
    total -= case["beta"] * ((inputs["grpo_old_logps"] - inputs["grpo_ref_logps"]) * is_answer).sum(axis=1)
    advantage = LeaveOneOut(whitened=case["normalize_advantages"])
    advantages = advantage(total.reshape(-1, 4), np.ones((2, 4), bool)).reshape(-1, 1)
    np.testing.assert_allclose(advantages[:, 0], case["advantages"], rtol=1e-4, atol=1e-6)
    grpo = GRPO(
        learning_rate=1e-6, batch_size=2, group_size=4, microbatch_size=8, ratio=AnswerRatio(), policy=Clipped()
    )
    batch = {**batch_of(inputs, {}, grpo), "advantages": jnp.asarray(advantages * is_answer)}
    batch.pop("reference_logprobs")
    logprobs = jnp.asarray(inputs["grpo_logps"])
    (loss, _), gradient = jax.value_and_grad(lambda x: grpo.loss(Given(), x, batch), has_aux=True)(logprobs)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(jnp.abs(gradient)), case["grad_abs_sum"], rtol=1e-4)
