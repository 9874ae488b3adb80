"""Direct preference optimization and its family: learn from pairs of a chosen and a rejected answer, without sampling.

One algorithm, made of values: how an answer's tokens become a number (`pooling`), what it is compared with
(`reference`, `divergence`), what a pair costs (`preference`), how much it counts (`weighting`), and how much the
chosen answer is also imitated (`sft_weight`). DPO, IPO, CPO, SimPO, ORPO … are settings of it: see conf/algorithm.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf.algorithms.base import Algorithm, Batch
from rlhf.algorithms.reference import Frozen, Reference
from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError
from rlhf.ops.divergence import Divergence, ReverseKL
from rlhf.ops.pair_weights import PairWeighting, Unweighted
from rlhf.ops.pooling import Alpha, Mean, Pooling, Sum, count_tokens
from rlhf.ops.preference import Pairs, Preference, Sigmoid
from rlhf.ops.weights import PerToken, Weighting


@config
class DPO(Algorithm):
    """The mean over pairs of a preference loss, plus `sft_weight` times the chosen answers' negative log-likelihood.

    beta: scale of the implicit reward; how strongly the policy is held to its reference.
    preference: the loss of a pair.
    divergence: which divergence from the reference; reverse KL makes scores log-ratios.
    pooling: from token log-probabilities to one number per answer.
    weighting: how much each pair counts.
    reference: where the reference's log-probabilities come from.
    sft_weight: weight of the imitation term (RPO, CPO, ORPO); 0 is none.
    sft_weighting: which mean that term takes over the chosen answers' tokens.
    """

    form = "preference"

    beta: Number = 0.1
    preference: Preference = Sigmoid()
    divergence: Divergence = ReverseKL()
    pooling: Pooling = Sum()
    weighting: PairWeighting = Unweighted()
    reference: Reference = Frozen()
    sft_weight: Number = 0.0
    sft_weighting: Weighting = PerToken()

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "beta", above=0)
        require_range(self, "sft_weight", at_least=0)
        name = type(self.preference).__name__
        rows = self.batch_size // self.minibatches
        if self.needs_whole_batch and self.microbatch_size != rows:
            raise ConfigError(
                f"algorithm.microbatch_size={self.microbatch_size} must be {rows} (batch_size {self.batch_size} / "
                f"minibatches {self.minibatches}): algorithm.preference={name} compares all pairs of a step"
            )
        if not self.preference.uses_divergence and type(self.divergence) is not ReverseKL:
            raise ConfigError(
                f"algorithm.divergence={type(self.divergence).__name__} has no effect on algorithm.preference={name}; "
                "use rlhf.ops.divergence.ReverseKL"
            )
        self._require_fitting_parts(name)
        if self.preference.needs_reward_shift and not self.reference.is_used:
            raise ConfigError(
                f"algorithm.reference=NoReference: algorithm.preference={name} compares rewards with a running mean "
                "against a reference; use rlhf.algorithms.reference.Frozen or shifted: false"
            )
        if not self.preference.uses_reference and self.reference.is_used:
            raise ConfigError(
                f"algorithm.reference={type(self.reference).__name__} has no effect on algorithm.preference={name}; "
                "use rlhf.algorithms.reference.NoReference"
            )

    def _require_fitting_parts(self, name: str) -> None:
        """Refuse what would be silently left out of the loss, or be another loss than it is called."""
        divergence, pooling, weighting = (type(x) for x in (self.divergence, self.pooling, self.weighting))
        if not self.reference.is_used and divergence is not ReverseKL:
            raise ConfigError(
                f"algorithm.divergence={divergence.__name__} is from a reference, and algorithm.reference=NoReference "
                "has none; use rlhf.ops.divergence.ReverseKL"
            )
        if self.needs_whole_batch and weighting is not Unweighted:
            raise ConfigError(
                f"algorithm.weighting={weighting.__name__} weighs pairs, and algorithm.preference={name} compares "
                "sorted scores, which are no pair's; use rlhf.ops.pair_weights.Unweighted"
            )
        if not self.preference.uses_pooling and pooling not in (Sum, Mean):
            raise ConfigError(
                f"algorithm.pooling={pooling.__name__} has no effect on algorithm.preference={name}; use "
                "rlhf.ops.pooling.Sum"
            )
        if self.preference.divides_by_length and pooling in (Mean, Alpha):
            raise ConfigError(
                f"algorithm.pooling={pooling.__name__} is per token already, and algorithm.preference={name} divides "
                "each score by its answer's length; use rlhf.ops.pooling.Sum, or per_token: false"
            )

    @property
    def needs_reference(self):
        return self.reference.is_used

    def provide_reference(self, live, batches, key):
        return self.reference.provide(live, batches, key)

    @property
    def needs_whole_batch(self):
        return self.preference.needs_whole_batch

    def prepare(self, runtime, params, batch, key):
        batch = {**batch, "sft_token_weight": self.sft_weighting(batch["is_answer"][:, 0])}
        if self.needs_reference:
            batch["reference_logprobs"] = self.reference.scorer(runtime, params).token_logprobs(batch)
        if self.preference.needs_reward_shift:
            batch["reward_shift"] = self._update_reward_shift(runtime, params, batch)
        return batch

    def loss(self, model, params, batch):
        if self.weighting.needs_collision:
            statistics = model.token_statistics(params, batch)
            logprobs, log_collision = statistics.logprobs, statistics.log_collision
        else:
            logprobs = model.token_logprobs(params, batch)  # chosen and rejected in one forward pass
            log_collision = jnp.zeros_like(logprobs)
        pairs = self.pairs(logprobs, batch)
        weight = self.weighting(logprobs, log_collision, jnp.asarray(batch["is_answer"]))
        nll = -jnp.mean(jnp.sum(batch["sft_token_weight"] * logprobs[:, 0], axis=-1))
        loss = jnp.mean(weight * self.preference(pairs, self.beta)) + self.sft_weight * nll
        return loss, {"nll": nll, **self._metrics(pairs)}

    def pairs(self, logprobs: Float[Array, "pairs 2 time"], batch: Batch) -> Pairs:
        """What the preference loss sees of a batch, given the policy's token log-probabilities."""
        is_answer = jnp.asarray(batch["is_answer"])
        policy = self.pooling(logprobs, is_answer)
        reference = jnp.zeros_like(policy)
        if self.needs_reference:
            reference = self.pooling(jnp.asarray(batch["reference_logprobs"]), is_answer)
        shift = batch["reward_shift"] if self.preference.needs_reward_shift else jnp.zeros(policy.shape[0])
        return Pairs(
            policy=policy,
            reference=reference,
            scores=self.divergence(policy - reference),
            mean_logprobs=Mean()(logprobs, is_answer),
            n_tokens=count_tokens(is_answer),
            reward_shift=jnp.asarray(shift),
        )

    def _metrics(self, pairs: Pairs) -> dict[str, Float[Array, ""]]:
        rewards = self.beta * pairs.log_ratios
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        parts = self.preference.parts(pairs, self.beta)
        return {
            "rewards/chosen": jnp.mean(chosen),
            "rewards/rejected": jnp.mean(rejected),
            "rewards/accuracies": jnp.mean(jnp.where(chosen == rejected, 0.5, chosen > rejected)),
            "rewards/margins": jnp.mean(chosen - rejected),
            "logps/chosen": jnp.mean(pairs.policy[:, 0]),
            "logps/rejected": jnp.mean(pairs.policy[:, 1]),
            **{f"loss/{name}": jnp.mean(losses) for name, losses in parts.items()},
        }

    def _update_reward_shift(self, runtime, params, batch) -> Float[Array, "pairs"]:
        """The mean reward of all batches before this one, for each row; then counts this batch in.

        The policy is scored here, because a loss can't remember anything; all stays on the device.
        """
        n_rows = batch["is_answer"].shape[0]
        memory = runtime.memory  # keys are set anew, never changed in place: a shallow copy of it is a snapshot
        mean = jnp.asarray(memory.get("reward_mean", 0.0), jnp.float32)
        count = jnp.asarray(memory.get("reward_count", 0.0), jnp.float32)
        logprobs = jnp.asarray(runtime.reference.with_params(params).token_logprobs(batch))
        pairs = self.pairs(logprobs, {**batch, "reward_shift": jnp.zeros(n_rows)})
        reward = self.beta * jnp.mean(pairs.scores)
        memory["reward_mean"] = mean + (reward - mean) * n_rows / (count + n_rows)
        memory["reward_count"] = count + n_rows
        return jnp.broadcast_to(mean, (n_rows,))

    def expected_first_loss(self):
        """The loss while the policy still is its reference, where it does not depend on the data."""
        has_data_terms = self.sft_weight != 0 or type(self.weighting) is not Unweighted
        if has_data_terms or not self.needs_reference:
            return None
        zeros = jnp.zeros((1, 2))
        unmoved = Pairs(
            policy=zeros,
            reference=zeros,
            scores=self.divergence(zeros),
            mean_logprobs=zeros,
            n_tokens=jnp.ones((1, 2)),
            reward_shift=jnp.zeros(1),
        )
        return float(self.preference(unmoved, self.beta)[0])
