"""What becomes of groups whose answers all have the same reward, from which nothing can be learnt, as values; and the
warning about whole batches of them."""

import logging
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from rlhf.algorithms.base import Runtime
from rlhf.algorithms.rollouts import Rollouts, join
from rlhf.config import config, require_range
from rlhf.ops.advantages import spread

log = logging.getLogger(__name__)

More = Callable[[int, int], Rollouts]  # (attempt, prompts) -> rollouts of so many new prompts


def varies(rollouts: Rollouts, group_size: int) -> Bool[np.ndarray, "prompts"]:
    """For each group whether two of its valid rewards differ."""
    shape = (-1, group_size)
    return spread(rollouts.rewards.reshape(shape).astype(np.float64), rollouts.is_valid.reshape(shape)) > 0


class Groups:
    """Chooses the groups of a batch."""

    @property
    def needs_group(self) -> bool:
        """Whether groups are judged by the spread of their rewards, so that one answer is too few."""
        return False

    def collect(
        self, first: Rollouts, n_prompts: int, group_size: int, more: More
    ) -> tuple[Rollouts, dict[str, float]]:
        """`n_prompts` groups, and metrics `groups/…`. more: generates further ones."""
        return first, {"groups/zero_variance": float(1 - varies(first, group_size).mean())} if group_size > 1 else {}

    def is_kept(self, rollouts: Rollouts, group_size: int) -> Bool[np.ndarray, "prompts"]:
        """Which groups have a loss."""
        return np.ones(len(rollouts) // group_size, bool)


@config
class KeepAll(Groups):
    """They stay, with advantages of 0: they count in means over tokens and answers, and the divergence from the
    reference is kept small on them."""


@config
class DropFlat(Groups):
    """They count nowhere: means are over the other groups."""

    @property
    def needs_group(self):
        return True

    def is_kept(self, rollouts, group_size):
        return varies(rollouts, group_size)


@config
class Resample(Groups):
    """New prompts take their place until the batch is full (dynamic sampling; DAPO, Yu et al., 2025, eq. 11).

    max_attempts: rollouts of new prompts in a step; flat groups fill up what is missing after the last.
    """

    max_attempts: int = 8

    @property
    def needs_group(self):
        return True

    def __post_init__(self):
        require_range(self, "max_attempts", at_least=1)

    def collect(
        self, first: Rollouts, n_prompts: int, group_size: int, more: More
    ) -> tuple[Rollouts, dict[str, float]]:
        parts, n_tried, attempts = [first], n_prompts, 0
        is_good = varies(first, group_size)
        while is_good.sum() < n_prompts and attempts < self.max_attempts:
            attempts += 1
            missing = n_prompts - int(is_good.sum())
            share = (is_good.sum() + 1) / (n_tried + 1)  # of groups that vary, as far as is known
            wanted = min(n_prompts, int(np.ceil(missing / share)))
            parts.append(more(attempts, wanted))
            is_good = np.concatenate([is_good, varies(parts[-1], group_size)])
            n_tried += wanted
        order = np.argsort(~is_good, kind="stable")[:n_prompts]  # those that vary first, in the order they came
        rows = (np.sort(order)[:, None] * group_size + np.arange(group_size)).ravel()
        metrics = {
            "groups/zero_variance": float(1 - is_good.mean()),
            "groups/tried": float(n_tried),
            "groups/attempts": float(attempts),
            "groups/missing": float(max(0, n_prompts - int(is_good.sum()))),
        }
        return join(parts).take(rows), metrics


def warn_if_flat(
    runtime: Runtime,
    rollouts: Rollouts,
    group_size: int,
    advantages: Float[np.ndarray, "rows *time"],
    has_kl: bool,
    needs_spread: bool = True,
) -> None:
    """Say so, loudly and early, when a batch has nothing to learn from; then at every doubling of the number of such.

    advantages: of each answer or of its tokens. has_kl: whether the loss holds the kept answers to a reference.
    needs_spread: whether equal answers, or equal rewards, teach nothing whatever the advantages are.
    """
    is_learning = not needs_spread and bool(advantages.any())
    reason = "" if is_learning else _flatness(rollouts, group_size, advantages, has_kl)
    if not reason:
        return
    n_flat = int(runtime.memory.get("n_flat_batches", 0)) + 1
    runtime.memory["n_flat_batches"] = np.asarray(n_flat)
    if n_flat & (n_flat - 1) == 0:
        so_far = f" ({n_flat} such batches so far)" if n_flat > 1 else ""
        log.warning("step %d: %s%s", runtime.step + 1, reason, so_far)


def _flatness(rollouts: Rollouts, group_size: int, advantages: Float[np.ndarray, "rows *time"], has_kl: bool) -> str:
    n, valid = len(rollouts), rollouts.rewards[rollouts.is_valid]
    if not valid.size:
        return f"the reward could not judge any of the {n} answers; nothing is learnt"
    groups = rollouts.tokens.reshape(-1, group_size, rollouts.tokens.shape[1])
    if group_size > 1 and (groups == groups[:, :1]).all():
        return (
            f"all {group_size} answers to each prompt are the same: nothing can be compared. Is the temperature too "
            "low, or is the model sure of everything?"
        )
    if n > 1 and valid.max() == valid.min():
        return (
            f"all {valid.size} answers have the reward {valid[0]:g}: nothing can be compared. Is the task too hard or "
            "too easy for this model, or does the reward not find what it looks for?"
        )
    if advantages.any():
        return ""
    left = "only the divergence from the reference has a gradient" if has_kl else "the gradient is 0"
    cut = "; all answers were cut at algorithm.max_new_tokens" if rollouts.is_truncated.all() else ""
    return f"every advantage is 0: {left}, and nothing is learnt from the rewards{cut}"
