"""Reward models: learn from comparisons, labels or ratings what an answer is worth.

A scalar head is read at the last token of an answer. Pairs are learnt by the Bradley-Terry loss; rows of a mixture
(`rlhf.data.mixture`) may also be single answers with a label or a number. After training the head is normalised, so
that its output has mean 0 and standard deviation 1 over answers of the training rows.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.reward_report import pair_report
from rlhf.config import Number, config, require_range
from rlhf.data.encode import TokenRow
from rlhf.data.examples import LABEL, PAIR, SCORE
from rlhf.errors import ConfigError
from rlhf.model.head import draw_head, last_hidden, normalised, raw_output
from rlhf.model.scorer import Scorer
from rlhf.ops.bradley_terry import label_losses, pair_losses, score_losses

log = logging.getLogger(__name__)


@config
class RewardModel(Algorithm):
    """The mean over rows of −log P(chosen is better); of −log P(label) and (score − rating)² / 2 where a mixture has
    such rows.

    margin: a pair's margin in the data times this is how far apart its scores should be at least; 0 ignores it.
    centering: weight of (chosen + rejected)², which keeps scores around 0.
    normalise_rows: training rows over whose answers the outputs have mean 0 and standard deviation 1 in the end; 0
        leaves them as they are.
    normalise_on: which answers of those rows: all, or chosen and single ones only.
    """

    form = "graded"
    headline = ("rewards/accuracies", "rewards/margins", "rewards/confidence", "grad_norm")

    margin: Number = 0.0
    centering: Number = 0.0
    normalise_rows: int = 512
    normalise_on: Literal["all", "chosen"] = "all"

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "margin", at_least=0)
        require_range(self, "centering", at_least=0)
        require_range(self, "normalise_rows", at_least=0)

    def components(self, params, load, seed):
        """The head of a reward model that training goes on with, not normalised any more; or a new one."""
        if "head" in params:
            log.info("head: that of the checkpoint, before it was normalised")
            return {"head": {**params["head"], "bias": jnp.float32(0), "scale": jnp.float32(1)}}
        return {"head": draw_head(seed, params["model"]["final_norm"].shape[0])}

    def prepare(self, runtime, params, batch, key):
        """Adds to the rows what makes a mean over some of them a mean over rows."""
        if "head" not in params:
            raise ConfigError("model.checkpoint is no reward model: it has no head; algorithm=reward_model trains one")
        n_tokens = batch["is_answer"].sum(axis=-1)
        kind = batch.get("kind", np.zeros(len(n_tokens), np.int32))
        is_pair, n_longer = kind == PAIR, n_tokens[:, 0] - n_tokens[:, 1]
        batch = {
            **batch,
            "of_pairs": _share(is_pair),
            "of_longer": _share(is_pair & (n_longer > 0)),
            "of_shorter": _share(is_pair & (n_longer < 0)),
            "length_difference": n_longer.astype(np.float32),
        }
        if "kind" in batch:
            batch |= {"of_labels": _share(kind == LABEL), "of_scores": _share(kind == SCORE)}
        return batch

    def loss(self, model, params, batch):
        head = params["head"]
        raw = raw_output(head, last_hidden(model, params, batch))
        first, second, value = raw[:, 0], raw[:, 1], jnp.asarray(batch["value"])
        losses = pair_losses(first, second, self.margin * value, self.centering)
        difference = first - second
        is_right = jnp.where(difference == 0, 0.5, difference > 0)
        metrics = {
            "rewards/chosen": _mean(batch["of_pairs"], head["scale"] * first + head["bias"]),
            "rewards/rejected": _mean(batch["of_pairs"], head["scale"] * second + head["bias"]),
            "rewards/margins": _mean(batch["of_pairs"], head["scale"] * difference),
            "rewards/accuracies": _mean(batch["of_pairs"], is_right),
            "rewards/accuracies_longer": _mean(batch["of_longer"], is_right),
            "rewards/accuracies_shorter": _mean(batch["of_shorter"], is_right),
            "rewards/confidence": _mean(batch["of_pairs"], jax.nn.sigmoid(jnp.abs(difference))),
            "rewards/length_difference": _mean(batch["of_pairs"], batch["length_difference"]),
        }
        if "kind" in batch:
            kind, is_good = jnp.asarray(batch["kind"]), value > 0.5
            labelled, rated = label_losses(first, is_good), score_losses(first, value)
            losses = jnp.select([kind == PAIR, kind == LABEL], [losses, labelled], rated)
            metrics |= {
                "rewards/label_accuracies": _mean(batch["of_labels"], (first > 0) == is_good),
                "rewards/squared_errors": _mean(batch["of_scores"], (first - value) ** 2),
            }
        return jnp.mean(losses), metrics

    def finish(self, runtime, params, seed):
        """The head, normalised over answers of training rows."""
        if not self.normalise_rows:
            return {}
        examples = runtime.examples
        order = np.random.default_rng([seed, 1]).permutation(len(examples))[: self.normalise_rows]
        sides = slice(0, 1) if self.normalise_on == "chosen" else slice(None)
        answers = [_up_to_the_end(row) for index in order for row in examples.sequences[index][sides]]
        plain = {**params, "head": {**params["head"], "bias": jnp.float32(0), "scale": jnp.float32(1)}}
        raw = Scorer(runtime.model, plain, self.microbatch_size)(answers)
        head = normalised(plain["head"], raw)
        found = {"mean": float(raw.mean()), "std": float(raw.std())}
        log.info(
            "head: raw outputs over %d answers (%s) of %d training rows have mean %.4f and standard deviation %.4f: "
            "outputs are raw × %.4f %+.4f from now on",
            len(answers), self.normalise_on, len(order), found["mean"], found["std"], head["scale"], head["bias"],
        )  # fmt: skip
        runtime.log.metrics |= {f"head/{name}": value for name, value in found.items()}
        runtime.log.metrics |= {"head/scale": float(head["scale"]), "head/bias": float(head["bias"])}
        return {"head": head}

    def report(self, rows, groups, params):
        return pair_report(rows, groups, float(params["head"]["scale"]))


def _share(of: Bool[np.ndarray, "rows"]) -> Float[np.ndarray, "rows"]:
    """Weights that make a mean over rows a mean over some of them; zeros where there are none."""
    return (of * (len(of) / max(of.sum(), 1))).astype(np.float32)


def _mean(weight: Any, values: Any) -> Float[Array, ""]:
    return jnp.mean(jnp.asarray(weight) * jnp.asarray(values))


def _up_to_the_end(row: TokenRow) -> Sequence[int]:
    """The tokens of a conversation to the last of its answer: a finished one ends with the stop token."""
    return row.tokens[: int(np.flatnonzero(row.is_answer)[-1]) + 1].tolist()
