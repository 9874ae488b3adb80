"""Supervised fine-tuning: maximise the likelihood of the answer, given the prompt."""

import jax.numpy as jnp

from rlhf.algorithms.base import Algorithm
from rlhf.config import config
from rlhf.ops.likelihood import NegativeLogLikelihood, TokenLoss
from rlhf.ops.weights import PerToken, Weighting


@config
class SFT(Algorithm):
    """Mean loss of the answer tokens.

    token_loss: the cost of a token; its negative log-likelihood by default.
    weighting: which mean; per token by default, over the whole batch and not over each microbatch.
    """

    form = "conversation"

    token_loss: TokenLoss = NegativeLogLikelihood()
    weighting: Weighting = PerToken()

    def prepare(self, runtime, params, batch, key):
        return {**batch, "weight": self.weighting(batch["is_answer"])}

    def loss(self, model, params, batch):
        logprobs = model.token_logprobs(params, batch)  # chunked: batch × time × vocab never exists

        def mean(costs):
            return jnp.mean(jnp.sum(batch["weight"] * costs, axis=-1))

        return mean(self.token_loss(logprobs)), {"nll": mean(-logprobs)}
