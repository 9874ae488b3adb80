"""Proximal policy optimization: learn from scored answers, token by token, with a critic that says what to expect.

A batch is generated, scored and valued once; then `epochs` × `minibatches` optimizer steps are taken on it. What an
answer's score becomes (`shaping`), where the divergence from the reference enters (`kl`), how the ratio is kept near 1
(`policy`) and where the critic comes from (`critic`) are values.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf.algorithms.base import Batch, Runtime
from rlhf.algorithms.critic import Critic
from rlhf.algorithms.groups import warn_if_flat
from rlhf.algorithms.policy_terms import kl_coefficient, mean, policy_scores, regularised
from rlhf.algorithms.rollouts import (
    Online,
    Rollouts,
    as_batch,
    log_rollouts,
    policy_logprobs,
    reference_logprobs,
    roll_out,
)
from rlhf.algorithms.saved_rollouts import replay
from rlhf.config import Number, config, require_range
from rlhf.ops.gae import explained_variance, generalized_advantage, last_of, token_rewards, value_losses, whiten
from rlhf.ops.kl import InReward, KLPenalty
from rlhf.ops.policy import Clipped, PolicyLoss, RatioLevel, TokenRatio
from rlhf.ops.reward_shaping import Shaping
from rlhf.ops.weights import PerToken, Weighting


@config
class PPO(Online):
    """The mean of a clipped policy loss over answer tokens, plus the critic's (Schulman et al., 2017, eq. 9).

    gamma: what a reward one token later is worth; 1 for answers, which end soon.
    lam: how far advantages trust rewards that came (1) rather than the critic's values (0).
    whiten_advantages: over the answer tokens of the batch: mean 0, standard deviation 1.
    whiten_rewards: divide token rewards by their standard deviation over the batch, before advantages.
    shaping: what is done to scores.
    policy: what a token costs, given ratio and advantage.
    ratio: what one importance ratio covers.
    weighting: which mean over tokens the losses are.
    kl: where the divergence from the reference enters; without any, no reference is loaded.
    entropy_bonus: weight of the policy's entropy, which is added to what is maximised; null: it is not computed.
    target_kl: the rest of a batch's optimizer steps is left out once the policy is further than this from the one that
        sampled, nats per token (`policy/approx_kl`); null: never.
    critic: where values come from and how they are learnt.
    """

    headline = (
        *("reward/mean", "kl/k1", "policy/entropy", "value/explained_variance"),
        *("policy/clipfrac", "sampling/mean_tokens", "grad_norm"),
    )

    group_size: int = 1
    gamma: Number = 1.0
    lam: Number = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    shaping: Shaping = Shaping()
    policy: PolicyLoss = Clipped()
    ratio: RatioLevel = TokenRatio()
    weighting: Weighting = PerToken()
    kl: KLPenalty = InReward(coef=0.05, per_token=True)
    entropy_bonus: Number | None = None
    target_kl: Number | None = None
    critic: Critic = Critic()

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "gamma", at_least=0, at_most=1)
        require_range(self, "lam", at_least=0, at_most=1)
        require_range(self, "entropy_bonus", at_least=0)
        require_range(self, "target_kl", above=0, may_be_infinite=True)

    @property
    def trains_entropy(self):
        return self.entropy_bonus is not None

    @property
    def needs_reference(self):
        return self.kl.is_used

    @property
    def stops_early(self):
        return self.target_kl is not None

    def is_far(self, metrics):
        return self.target_kl is not None and bool(metrics["policy/approx_kl"] > self.target_kl)

    def components(self, params, load, seed):
        return {"critic": self.critic.begin(params, load, seed)}

    def learning_rates(self, names, n_done, n_total):
        share = self.schedule(n_done, n_total)
        policy = jnp.where(n_done < self.critic.warmup, 0.0, self.learning_rate * share)
        return {name: self.critic.learning_rate * share if name == "critic" else policy for name in names}

    def clip_groups(self, names):
        return [tuple(name for name in names if name != "critic"), ("critic",)]

    def prepare(self, runtime, params, batch, key):
        if self.replay is not None:
            rollouts = replay(runtime, self)
        else:
            rollouts = roll_out(runtime, params, batch["prompts"], self)
        batch = as_batch(runtime, rollouts, self.max_new_tokens)
        batch["old_logprobs"] = policy_logprobs(runtime, params, batch, self)
        if self.needs_reference:
            batch["reference_logprobs"] = reference_logprobs(runtime, batch, self)
        batch["old_values"] = self.critic.values(runtime.model, params, batch, self.microbatch_size)
        is_counted = batch["is_answer"] & rollouts.is_valid[:, None]
        rewards = self._token_rewards(runtime, rollouts, batch, is_counted)
        values = np.where(is_counted, batch["old_values"], 0.0).astype(np.float32)
        plain = generalized_advantage(rewards, values, is_counted, float(self.gamma), float(self.lam))
        advantages = whiten(plain, is_counted) if self.whiten_advantages else plain
        batch |= {
            "advantages": advantages,
            "returns": plain + values,
            "weight": self.weighting(is_counted).astype(np.float32),
            "token_weight": PerToken()(batch["is_answer"]).astype(np.float32),
        }
        self._tell(runtime, rollouts, batch, is_counted, plain)
        return batch

    def _token_rewards(
        self, runtime: Runtime, rollouts: Rollouts, batch: Batch, is_counted: Any
    ) -> Float[np.ndarray, "rows time"]:
        """Of each answer token: its share of the divergence, and at the last one the answer's shaped score."""
        scores = self.shaping(rollouts.rewards, rollouts.is_truncated, rollouts.is_valid, runtime.memory)
        penalty = np.zeros(is_counted.shape, np.float32)
        if isinstance(self.kl, InReward) and self.kl.is_used:
            log_ratio = (batch["old_logprobs"] - batch["reference_logprobs"]) * is_counted
            penalty = (kl_coefficient(runtime, self.kl, log_ratio, is_counted) * log_ratio).astype(np.float32)
            if not self.kl.per_token:
                penalty = np.where(last_of(is_counted), penalty.sum(axis=1, keepdims=True), 0.0)
        runtime.log.metrics |= {
            "reward/shaped": float(scores[rollouts.is_valid].mean()) if rollouts.is_valid.any() else 0.0,
            "reward/kl_penalty": float(penalty.sum(axis=1).mean()),
        }
        rewards = token_rewards(scores, penalty, is_counted).astype(np.float32)
        return whiten(rewards, is_counted, keep_mean=True) if self.whiten_rewards else rewards

    def _tell(self, runtime: Runtime, rollouts: Rollouts, batch: Batch, is_counted: Any, plain: Any) -> None:
        by_answer = batch["advantages"].sum(axis=-1) / rollouts.n_tokens
        log_rollouts(runtime, rollouts, by_answer)
        counted = batch["returns"][is_counted] if is_counted.any() else np.zeros(1, np.float32)
        runtime.log.metrics |= {
            "value/explained_variance": explained_variance(batch["old_values"], batch["returns"], is_counted),
            "returns/mean": float(counted.mean()),
            "returns/std": float(counted.std()),
            "advantages/token_std": float(plain[is_counted].std()) if is_counted.any() else 0.0,
        }
        has_kl = self.needs_reference and not isinstance(self.kl, InReward)
        warn_if_flat(runtime, rollouts, self.group_size, batch["advantages"], has_kl and bool(is_counted.any()))

    def loss(self, model, params, batch):
        tokens, entropy = policy_scores(self, model, params, batch)
        cost, weight = self.policy(tokens), batch["weight"]
        values = self.critic(model, params, batch)
        old_values, returns = jnp.asarray(batch["old_values"]), jnp.asarray(batch["returns"])
        errors, is_clipped = value_losses(values, old_values, returns, self.critic.clip)
        metrics = {
            "policy/loss": mean(cost, weight),
            "value/loss": mean(errors, weight),
            "value/clipfrac": mean(is_clipped, weight),
            "value/mean": mean(values, weight),
        }
        cost, of_policy = regularised(self, cost, tokens, entropy, batch)
        return mean(cost, weight) + self.critic.loss_weight * metrics["value/loss"], {**of_policy, **metrics}
