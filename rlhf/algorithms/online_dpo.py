"""Online DPO: preference optimization on pairs of the policy's own answers, judged by the reward."""

import jax.numpy as jnp
import numpy as np

from rlhf.algorithms.groups import varies, warn_if_flat
from rlhf.algorithms.rollouts import Online, as_batch, log_rollouts, reference_logprobs
from rlhf.algorithms.saved_rollouts import rolled_out
from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError
from rlhf.ops.kl import kl_metrics
from rlhf.ops.pooling import Mean, Sum, count_tokens
from rlhf.ops.preference import Pairs, Preference, Sigmoid
from rlhf.ops.weights import PerToken


@config
class OnlineDPO(Online):
    """The mean of a preference loss over pairs: the best and the worst answer of each group (Guo et al., 2024,
    algorithm 1, with two answers). Pairs of equal rewards count nothing.

    All log-probabilities are at the rollout's temperature. `batch_size`, `microbatch_size` and `minibatches` count
    pairs, of which each prompt makes one.

    beta: scale of the implicit reward; how strongly the policy is held to its reference.
    preference: the loss of a pair.
    sft_weight: weight of the chosen answers' negative log-likelihood, per token; 0 is none.
    """

    headline = ("reward/mean", "rewards/accuracies", "rewards/margins", "groups/zero_variance", "grad_norm")

    group_size: int = 2
    beta: Number = 0.1
    preference: Preference = Sigmoid()
    sft_weight: Number = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "beta", above=0)
        require_range(self, "sft_weight", at_least=0)
        name = type(self.preference).__name__
        if self.group_size < 2:
            raise ConfigError(f"algorithm.group_size={self.group_size} must be at least 2: pairs are made of a group")
        if self.preference.needs_whole_batch or self.preference.needs_reward_shift:
            raise ConfigError(
                f"algorithm.preference={name} compares pairs with others; online DPO takes losses of single pairs"
            )
        if not self.preference.uses_reference:
            raise ConfigError(f"algorithm.preference={name} ignores the reference, which online DPO is held to")

    @property
    def rows_per_batch(self):
        return self.batch_size

    @property
    def needs_reference(self):
        return True

    def prepare(self, runtime, params, batch, key):
        rollouts = rolled_out(runtime, params, batch["prompts"], self)
        by_group = (-1, self.group_size)
        rewards, is_valid = rollouts.rewards.reshape(by_group), rollouts.is_valid.reshape(by_group)
        best = np.where(is_valid, rewards, -np.inf).argmax(axis=1)
        worst = np.where(is_valid, rewards, np.inf).argmin(axis=1)
        start, is_told = np.arange(len(best)) * self.group_size, varies(rollouts, self.group_size)
        sign = np.zeros(len(rollouts), np.float32)
        sign[start + best], sign[start + worst] = is_told, -1.0 * is_told
        log_rollouts(runtime, rollouts, sign)
        runtime.log.metrics |= {"groups/zero_variance": float(1 - is_told.mean())}
        warn_if_flat(runtime, rollouts, self.group_size, sign, has_kl=False)
        sides = [as_batch(runtime, rollouts.take(start + side), self.max_new_tokens) for side in (best, worst)]
        pairs = {name: np.stack([side[name] for side in sides], axis=1) for name in sides[0]}
        pairs |= {"row": sides[0]["row"]} | ({"images": sides[0]["images"]} if "images" in sides[0] else {})
        is_answer = pairs["is_answer"]
        chosen = is_answer[:, 0] & is_told[:, None]
        return {
            **pairs,
            "reference_logprobs": reference_logprobs(runtime, pairs, self),
            "pair_weight": (is_told * (len(is_told) / max(is_told.sum(), 1))).astype(np.float32),
            "sft_token_weight": PerToken()(chosen).astype(np.float32),
            "token_weight": PerToken()(is_answer.reshape(-1, is_answer.shape[-1]))
            .reshape(is_answer.shape)
            .astype("f4"),
        }

    def loss(self, model, params, batch):
        logprobs = model.token_logprobs(params, batch, self.method.temperature)
        is_answer = jnp.asarray(batch["is_answer"])
        policy, reference = (Sum()(x, is_answer) for x in (logprobs, jnp.asarray(batch["reference_logprobs"])))
        pairs = Pairs(
            policy=policy,
            reference=reference,
            scores=policy - reference,
            mean_logprobs=Mean()(logprobs, is_answer),
            n_tokens=count_tokens(is_answer),
            reward_shift=jnp.zeros(policy.shape[0]),
        )
        weight = batch["pair_weight"]
        nll = -jnp.mean(jnp.sum(batch["sft_token_weight"] * logprobs[:, 0], axis=-1))
        loss = jnp.mean(weight * self.preference(pairs, self.beta)) + self.sft_weight * nll
        rewards = self.beta * pairs.log_ratios
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        log_ratio = ((logprobs - batch["reference_logprobs"]) * is_answer).reshape(-1, is_answer.shape[-1])
        return loss, {
            "nll": nll,
            "rewards/chosen": jnp.mean(weight * chosen),
            "rewards/rejected": jnp.mean(weight * rejected),
            "rewards/margins": jnp.mean(weight * (chosen - rejected)),
            "rewards/accuracies": jnp.mean(weight * jnp.where(chosen == rejected, 0.5, chosen > rejected)),
            **kl_metrics(log_ratio, batch["token_weight"].reshape(log_ratio.shape)),
        }
