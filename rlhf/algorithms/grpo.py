"""Group relative policy optimization and its family: answers to one prompt are compared with each other, without a
critic.

One algorithm, made of values: how rewards become advantages (`advantage`), at which level the importance ratio is taken
(`ratio`), how it is kept near 1 (`policy`), which mean the loss is (`weighting`), where the divergence from the
reference enters (`kl`), what becomes of groups without spread (`groups`) and of cut answers (`truncation`), and how
answers are weighed that the sampler's numbers and the trainer's disagree on (`correction`). GRPO, Dr. GRPO, DAPO, GSPO,
CISPO, RLOO, REINFORCE++ … are settings of it: see conf/algorithm.

**Old log-probabilities.** With one optimizer step per batch the policy that is trained still is the one that sampled:
the ratio is π over a copy of itself without a gradient, which is 1 to the last bit and costs nothing. With several, or
with the divergence in the reward, the trainer's own function computes them once per batch. The sampler's are never
taken: they are rounded differently, so ratios would not be 1 at the start; `correction` is about that difference.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf.algorithms.base import Batch, Params, Runtime
from rlhf.algorithms.groups import Groups, KeepAll, warn_if_flat
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
from rlhf.algorithms.together import rows_of
from rlhf.config import Number, config, require_range
from rlhf.data.encode import Prompt
from rlhf.errors import ConfigError
from rlhf.ops.advantages import Advantage, GroupNormalised
from rlhf.ops.kl import InLoss, InReward, KLPenalty
from rlhf.ops.policy import (
    Clipped,
    Correction,
    NoCorrection,
    PolicyLoss,
    RatioLevel,
    TokenRatio,
)
from rlhf.ops.token_choice import AllTokens, TokenChoice
from rlhf.ops.truncation import KeepTruncated, Truncation
from rlhf.ops.weights import PerSequence, PerToken, Weighting


@config
class GRPO(Online):
    """The mean of a policy loss over answer tokens, with a penalty for leaving the reference.

    advantage: how much better each answer of a group is than expected.
    ratio: what one importance ratio covers.
    policy: what a token costs, given ratio and advantage.
    weighting: which mean over tokens the loss is.
    kl: where the divergence from the reference enters; without any, no reference is loaded.
    groups: what becomes of groups whose rewards are all the same.
    truncation: what becomes of answers that are cut or nearly too long.
    correction: how much answers count that the trainer finds less or more likely than the sampler did.
    tokens: which tokens of the answers have a policy loss.
    entropy_bonus: weight of the policy's entropy, which is added to what is maximised; null: it is not computed.
    """

    headline = ("reward/mean", "kl/k1", "policy/entropy", "groups/zero_variance", "sampling/mean_tokens", "grad_norm")

    advantage: Advantage = GroupNormalised()
    ratio: RatioLevel = TokenRatio()
    policy: PolicyLoss = Clipped()
    weighting: Weighting = PerSequence()
    kl: KLPenalty = InLoss()
    groups: Groups = KeepAll()
    truncation: Truncation = KeepTruncated()
    correction: Correction = NoCorrection()
    tokens: TokenChoice = AllTokens()
    entropy_bonus: Number | None = None

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "entropy_bonus", at_least=0)
        self.truncation.require_fits(self.max_new_tokens)
        for name in ("advantage", "groups"):
            choice = getattr(self, name)
            if choice.needs_group and self.group_size < 2:
                raise ConfigError(
                    f"algorithm.group_size={self.group_size} must be at least 2: algorithm.{name}="
                    f"{type(choice).__name__} compares the answers to a prompt with each other"
                )

    @property
    def trains_entropy(self):
        return self.entropy_bonus is not None

    @property
    def needs_reference(self):
        return self.kl.is_used

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy is scored before the update; if not, it is its own old policy."""
        return self.epochs * self.minibatches > 1 or (self.kl.is_used and isinstance(self.kl, InReward))

    def prepare(self, runtime, params, batch, key):
        rollouts, told = self._collect(runtime, params, batch["prompts"])
        batch = as_batch(runtime, rollouts, self.max_new_tokens)
        in_rows = rows_of(runtime, rollouts, self)
        seen, shape = in_rows(batch), batch["tokens"].shape
        if self.needs_old_logprobs:
            batch["old_logprobs"] = policy_logprobs(runtime, params, seen, self).reshape(shape)
        if self.needs_reference:
            batch["reference_logprobs"] = reference_logprobs(runtime, seen, self).reshape(shape)
        is_kept = rollouts.is_valid & self.truncation.is_kept(rollouts.is_truncated)
        is_kept &= np.repeat(self.groups.is_kept(rollouts, self.group_size), self.group_size)
        is_counted = batch["is_answer"] & is_kept[:, None]
        advantages = self._advantages(runtime, rollouts, batch) * is_counted
        by_answer = advantages.sum(axis=-1) / rollouts.n_tokens
        self._tell(runtime, rollouts, by_answer, is_kept, told)
        return in_rows(
            {
                **batch,
                "advantages": advantages,
                "weight": self.weighting(is_counted).astype(np.float32),
                "is_chosen": self.tokens(is_counted, batch["sampler_entropy"]),
                "token_weight": PerToken()(batch["is_answer"]).astype(np.float32),
            }
        )

    def rows_at_once(self, batch):
        return self.microbatch_size // (1 if batch["tokens"].ndim == 2 else batch["tokens"].shape[1])

    def _collect(self, runtime: Runtime, params: Params, prompts: list[Prompt]) -> tuple[Rollouts, dict[str, float]]:
        """A batch of scored answers, and metrics of its groups."""

        def more(attempt: int, n: int) -> Rollouts:
            further: Any = runtime.more_prompts
            start = int(runtime.memory.get("n_more_prompts", 0))
            runtime.memory["n_more_prompts"] = np.asarray(start + n)
            return roll_out(runtime, params, further(start, n), self, attempt)

        if self.replay is not None:
            return KeepAll().collect(replay(runtime, self), self.batch_size, self.group_size, more)
        return self.groups.collect(roll_out(runtime, params, prompts, self), self.batch_size, self.group_size, more)

    def _advantages(self, runtime: Runtime, rollouts: Rollouts, batch: Batch) -> Float[np.ndarray, "rows time"]:
        """Of each answer token; the same for all of an answer, unless each answers for the divergence after it."""
        is_answer, by_group = batch["is_answer"], (-1, self.group_size)
        penalty = np.zeros(is_answer.shape, np.float32)
        if isinstance(self.kl, InReward) and self.kl.is_used:
            log_ratio = (batch["old_logprobs"] - batch["reference_logprobs"]) * is_answer
            is_judged = is_answer & rollouts.is_valid[:, None]
            penalty = kl_coefficient(runtime, self.kl, log_ratio * is_judged, is_judged) * log_ratio
        later = np.cumsum(penalty[:, ::-1], axis=-1)[:, ::-1]  # of each token and those after it
        is_per_token = isinstance(self.kl, InReward) and self.kl.per_token
        rewards = self.truncation.shaped(
            rollouts.rewards, rollouts.n_tokens, rollouts.is_truncated, self.max_new_tokens
        )
        rewards = rewards if is_per_token else rewards - penalty.sum(axis=-1)
        answers = self.advantage(rewards.reshape(by_group), rollouts.is_valid.reshape(by_group)).reshape(-1, 1)
        tokens = (answers - later if is_per_token else answers) * is_answer
        return self.advantage.over_tokens(tokens, is_answer & rollouts.is_valid[:, None])

    def _tell(self, runtime: Runtime, rollouts: Rollouts, advantages: Any, is_kept: Any, told: dict) -> None:
        log_rollouts(runtime, rollouts, advantages)
        rewards = rollouts.rewards.reshape(-1, self.group_size)
        of_groups = {"groups/reward_std": float(rewards.std(axis=1).mean())} if self.group_size > 1 else {}
        runtime.log.metrics |= told | {
            **of_groups,
            "advantages/std": float(advantages.std()),
            "answers/kept": float(is_kept.mean()),
        }
        has_kl = self.needs_reference and not isinstance(self.kl, InReward)
        warn_if_flat(runtime, rollouts, self.group_size, advantages, has_kl and bool(is_kept.any()))

    def loss(self, model, params, batch):
        tokens, entropy = policy_scores(self, model, params, batch)
        cost = self.policy(tokens) * self.correction(tokens) * batch["is_chosen"]
        cost, metrics = regularised(self, cost, tokens, entropy, batch)
        return mean(cost, batch["weight"]), metrics
