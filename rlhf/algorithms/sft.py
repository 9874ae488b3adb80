"""Supervised fine-tuning: maximise the likelihood of the answer, given the prompt."""

import jax.numpy as jnp

from rlhf.algorithms.base import Algorithm
from rlhf.config import config
from rlhf.ops.weights import PerToken, Weighting


@config
class SFT(Algorithm):
    """Mean negative log-likelihood of the answer tokens.

    weighting: which mean; per token by default, over the whole batch and not over each microbatch.
    """

    form = "conversation"

    weighting: Weighting = PerToken()

    def prepare(self, runtime, params, batch, key):
        return {**batch, "weight": self.weighting(batch["is_answer"])}

    def loss(self, model, params, batch):
        logprobs = model.token_logprobs(params, batch)  # chunked: batch × time × vocab never exists
        nll = -jnp.mean(jnp.sum(batch["weight"] * logprobs, axis=-1))
        return nll, {"nll": nll}
