"""What online algorithms share: the policy's scores, what is added to the cost of a token, and the coefficient of a
divergence in the reward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from rlhf.algorithms.base import Batch, Metrics, Runtime
from rlhf.ops.kl import InLoss, InReward, kl_metrics
from rlhf.ops.policy import PolicyTokens, ratio_metrics
from rlhf.ops.reward_shaping import Adaptive


def policy_scores(
    algorithm: Any, model: Any, params: Any, batch: Batch
) -> tuple[PolicyTokens, Float[Array, "*batch time"] | None]:
    """The policy's tokens as losses see them, at the rollout's temperature, and entropies where those are trained.

    Without `old_logprobs` in the batch the policy is its own old one: the ratio is 1 to the last bit.
    """
    entropy = None
    if not algorithm.trains_entropy:
        logprobs = model.token_logprobs(params, batch, algorithm.method.temperature)
    else:
        logprobs, entropy, _ = model.token_statistics(params, batch, algorithm.method.temperature)
    old = jax.lax.stop_gradient(jnp.asarray(batch.get("old_logprobs", logprobs)))
    is_answer = jnp.asarray(batch["is_answer"])
    tokens = PolicyTokens(
        logprobs=logprobs,
        old_logprobs=old,
        sampler_logprobs=jnp.asarray(batch["sampler_logprobs"]),
        ratio=algorithm.ratio((logprobs - old) * is_answer, is_answer),
        advantages=jnp.asarray(batch["advantages"]),
        is_answer=is_answer,
    )
    return tokens, entropy


def regularised(
    algorithm: Any,
    cost: Float[Array, "*batch time"],
    tokens: PolicyTokens,
    entropy: Float[Array, "*batch time"] | None,
    batch: Batch,
) -> tuple[Float[Array, "*batch time"], Metrics]:
    """`cost` with the entropy bonus and the divergence in the loss, and the metrics of the policy's tokens."""
    if entropy is not None:
        cost = cost - algorithm.entropy_bonus * entropy
    weight = batch["token_weight"]
    gap = jnp.abs(tokens.old_logprobs - tokens.sampler_logprobs) * tokens.is_answer
    metrics = ratio_metrics(tokens, algorithm.policy, weight)
    metrics["sampling/logp_difference"] = mean(gap, weight)
    if "reference_logprobs" in batch:
        log_ratio = (tokens.logprobs - batch["reference_logprobs"]) * tokens.is_answer
        metrics |= kl_metrics(log_ratio, weight)
        if isinstance(kl := algorithm.kl, InLoss):
            divergence = kl.estimator(log_ratio)
            cost += kl.coef * (divergence * tokens.ratio if kl.importance_weighted else divergence)
    return cost, metrics


def kl_coefficient(
    runtime: Runtime,
    kl: InReward,
    log_ratio: Float[np.ndarray, "rows time"],
    is_counted: Bool[np.ndarray, "rows time"],
) -> float:
    """That of this batch's divergence in the reward, noted as `kl/coef`; an adaptive one remembers the next.

    log_ratio: log π − log π_ref of each token that counts, 0 elsewhere.
    """
    coef = float(runtime.memory.get("kl_coef", kl.coef))
    if isinstance(kl, Adaptive):
        n_answers = int(is_counted.any(axis=1).sum())
        divergence = float(log_ratio.sum()) / max(n_answers, 1)
        runtime.memory["kl_coef"] = np.asarray(kl.followed(coef, divergence, n_answers), np.float64)
    runtime.log.metrics["kl/coef"] = coef
    return coef


def mean(values: Shaped[Array, "*batch time"], weight: Float[Array, "*batch time"]) -> Float[Array, ""]:
    """The mean over rows of the weighted sum over tokens."""
    return jnp.mean(jnp.sum(weight * values, axis=-1))
