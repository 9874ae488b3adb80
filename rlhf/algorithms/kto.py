"""Learning from single answers that are labelled desirable or undesirable, instead of from pairs (KTO)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf.algorithms.base import Algorithm, Batch
from rlhf.algorithms.reference import Frozen, Precomputed, Reference
from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError
from rlhf.ops.unpaired import KahnemanTversky, Unpaired


def estimate_kl(policy: Any, reference: Any, mismatched: Batch) -> Float[Array, ""]:
    """How far the policy has moved: max(0, mean log-ratio of answers to other prompts), in nats.

    An answer to another prompt stands for a sample of the policy (Ethayarajh et al., 2024, section 4): biased, but of
    the right scale, and nothing is generated.
    """
    log_ratios = jnp.asarray(policy.token_logprobs(mismatched)) - jnp.asarray(reference.token_logprobs(mismatched))
    return jnp.maximum(jnp.mean(jnp.sum(log_ratios * mismatched["is_answer"], axis=-1)), 0.0)


@config
class KTO(Algorithm):
    """The mean over answers of a loss on the log-ratio, desirable and undesirable ones weighted apart.

    beta: scale of the implicit reward; risk aversion.
    preference: the loss of an answer.
    desirable_weight, undesirable_weight: make up for unequal numbers of the two: their products with the numbers
        should be within a factor of 1 to 4/3 of each other (Ethayarajh et al., 2024, section 4).
    reference: where the reference's log-probabilities come from.
    """

    form = "unpaired"

    beta: Number = 0.1
    preference: Unpaired = KahnemanTversky()
    desirable_weight: Number = 1.0
    undesirable_weight: Number = 1.0
    reference: Reference = Frozen()

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "beta", above=0)
        require_range(self, "desirable_weight", at_least=0)
        require_range(self, "undesirable_weight", at_least=0)
        if isinstance(self.reference, Precomputed):
            raise ConfigError(
                "algorithm.reference=Precomputed: the KL estimate pairs each prompt with another answer of its batch, "
                "which no file can hold beforehand; use rlhf.algorithms.reference.Frozen"
            )
        if not self.reference.is_used:
            raise ConfigError(
                "algorithm.reference=NoReference: an unpaired loss measures an answer against a reference; "
                "use rlhf.algorithms.reference.Frozen"
            )

    @property
    def needs_reference(self):
        return True

    def provide_reference(self, live, batches, key):
        return self.reference.provide(live, batches, key)

    def prepare(self, runtime, params, batch, key):
        """Adds the reference's log-probabilities, the KL estimate, and each row's share in the means over its kind."""
        mismatched = {name.removeprefix("kl_"): batch[name] for name in batch if name.startswith("kl_")}
        mismatched |= {"images": batch["images"]} if "images" in batch else {}  # the prompts are the rows' own
        batch = {name: batch[name] for name in batch if not name.startswith("kl_")}
        is_desirable = batch["is_desirable"]
        n_rows = is_desirable.shape[0]
        reference = self.reference.scorer(runtime, params)
        batch["reference_logprobs"] = reference.token_logprobs(batch)
        if self.preference.needs_kl:
            policy = runtime.reference.with_params(params)
            batch["kl"] = jnp.broadcast_to(estimate_kl(policy, reference, mismatched), (n_rows,))
        else:
            batch["kl"] = jnp.zeros(n_rows)
        batch["chosen_share"] = is_desirable * (n_rows / is_desirable.sum().clip(1))
        batch["rejected_share"] = ~is_desirable * (n_rows / (~is_desirable).sum().clip(1))
        return batch

    def loss(self, model, params, batch):
        logprobs = model.token_logprobs(params, batch)
        is_answer, is_desirable = batch["is_answer"], jnp.asarray(batch["is_desirable"])
        sums = jnp.sum(logprobs * is_answer, axis=-1)
        log_ratios = sums - jnp.sum(batch["reference_logprobs"] * is_answer, axis=-1)
        losses = self.preference(log_ratios, jnp.asarray(batch["kl"]), is_desirable, self.beta)
        weight = jnp.where(is_desirable, self.desirable_weight, self.undesirable_weight)
        chosen, rejected = batch["chosen_share"], batch["rejected_share"]
        rewards = self.beta * log_ratios
        return jnp.mean(weight * losses), {
            "kl": jnp.mean(batch["kl"]),
            "rewards/chosen": jnp.mean(chosen * rewards),
            "rewards/rejected": jnp.mean(rejected * rewards),
            "rewards/margins": jnp.mean((chosen - rejected) * rewards),
            "logps/chosen": jnp.mean(chosen * sums),
            "logps/rejected": jnp.mean(rejected * sums),
        }

    def expected_first_loss(self):
        """Half the weight: with log-ratios and KL at 0 each loss is σ(0), whatever its label."""
        return 0.5 * float(self.desirable_weight) if self.desirable_weight == self.undesirable_weight else None
