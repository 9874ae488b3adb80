"""Rejection-sampling fine-tuning: imitate the best of the policy's own answers."""

import jax.numpy as jnp
import numpy as np

from rlhf.algorithms.groups import varies, warn_if_flat
from rlhf.algorithms.rollouts import Online, as_batch, log_rollouts
from rlhf.algorithms.saved_rollouts import rolled_out
from rlhf.config import config, require_range
from rlhf.errors import ConfigError
from rlhf.ops.weights import PerToken, Weighting


@config
class RFT(Online):
    """The negative log-likelihood of the answers that are kept: of each prompt's group the `n_best` of the highest
    reward, as far as they reach `least_reward`, each once.

    With n_best = 1 this is best-of-n, as RAFT learns from it (Dong et al., 2023, algorithm 1); with a least reward that
    only right answers have and n_best = group_size it is RFT (Yuan et al., 2023, section 3.3).

    n_best: answers kept of each group, at most. `microbatch_size` and `minibatches` count these.
    least_reward: answers below are not imitated; null imitates the best however bad they are.
    weighting: which mean the loss takes over answer tokens.
    """

    headline = ("reward/mean", "reward/kept_mean", "answers/kept", "groups/zero_variance", "grad_norm")

    n_best: int = 1
    least_reward: float | None = None
    weighting: Weighting = PerToken()

    def __post_init__(self):
        require_range(self, "n_best", at_least=1)
        if self.n_best > self.group_size:
            raise ConfigError(
                f"algorithm.n_best={self.n_best} must be at most algorithm.group_size={self.group_size}: there are no "
                "more answers to a prompt"
            )
        super().__post_init__()

    @property
    def rows_per_batch(self):
        return self.batch_size * self.n_best

    def prepare(self, runtime, params, batch, key):
        rollouts = rolled_out(runtime, params, batch["prompts"], self)
        is_good = rollouts.is_valid & self._is_first(rollouts.tokens)
        if self.least_reward is not None:
            is_good &= rollouts.rewards >= self.least_reward
        by_group = np.where(is_good, rollouts.rewards, -np.inf).reshape(-1, self.group_size)
        best = np.argsort(-by_group, axis=1, kind="stable")[:, : self.n_best]
        rows = (best + np.arange(len(best))[:, None] * self.group_size).ravel()
        is_kept = np.zeros(len(rollouts), bool)
        is_kept[rows] = is_good[rows]
        log_rollouts(runtime, rollouts, is_kept.astype(np.float32))
        runtime.log.metrics |= {
            "groups/zero_variance": float(1 - varies(rollouts, self.group_size).mean()),
            "answers/kept": float(is_kept.mean()),
            "reward/kept_mean": float(rollouts.rewards[is_kept].mean()) if is_kept.any() else 0.0,
        }
        needs_spread = self.least_reward is None  # else answers that are all right teach as well
        warn_if_flat(runtime, rollouts, self.group_size, is_kept.astype(np.float32), False, needs_spread)
        chosen = as_batch(runtime, rollouts.take(rows), self.max_new_tokens)
        is_counted = chosen["is_answer"] & is_good[rows][:, None]
        return {**chosen, "weight": self.weighting(is_counted).astype(np.float32)}

    def _is_first(self, tokens: np.ndarray) -> np.ndarray:
        """For each answer whether no earlier one of its group is the same."""
        seen: set[tuple[int, bytes]] = set()
        is_first = np.zeros(len(tokens), bool)
        for row, ids in enumerate(tokens):
            key = (row // self.group_size, ids.tobytes())
            is_first[row] = key not in seen
            seen.add(key)
        return is_first

    def loss(self, model, params, batch):
        """At temperature 1: what is imitated is the model that answers, not the one that explored."""
        logprobs = model.token_logprobs(params, batch)
        nll = -jnp.mean(jnp.sum(batch["weight"] * logprobs, axis=-1))
        return nll, {"nll": nll}
