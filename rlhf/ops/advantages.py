"""Advantages of answers that are compared with others to the same prompt, as values: from rewards to advantages.

Rewards of answers that could not be judged are not valid: they are in no mean or deviation, and their advantage is 0.
A group in which all valid rewards are the same has advantages of exactly 0. Deviations are unbiased (n − 1).
"""

from abc import abstractmethod

import numpy as np
from jaxtyping import Bool, Float, Real

from rlhf.config import Number, config, require_range

Rewards = Float[np.ndarray, "prompts group"]
Valid = Bool[np.ndarray, "prompts group"]


def spread(rewards: Rewards, is_valid: Valid) -> Float[np.ndarray, "prompts"]:
    """Largest minus smallest valid reward of each group; 0 where fewer than two are valid."""
    high = np.where(is_valid, rewards, -np.inf).max(axis=1)
    low = np.where(is_valid, rewards, np.inf).min(axis=1)
    return np.where(is_valid.sum(axis=1) >= 2, high - low, 0.0)


def _centred(rewards: Rewards, is_valid: Valid) -> Float[np.ndarray, "prompts group"]:
    """Minus the mean of the group's valid ones; exactly 0 where these are the same."""
    n = np.maximum(is_valid.sum(axis=1, keepdims=True), 1)
    mean = np.where(is_valid, rewards, 0.0).sum(axis=1, keepdims=True) / n
    is_kept = is_valid & (spread(rewards, is_valid) > 0)[:, None]
    return np.where(is_kept, rewards - mean, 0.0)


def _deviation(values: Float[np.ndarray, "some"]) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def _divided(values: np.ndarray, by: np.ndarray | float) -> np.ndarray:
    """0 / 0 is 0: nothing differs, so nothing is better."""
    return np.divide(values, by, out=np.zeros_like(values), where=np.asarray(by) > 0)


class Advantage:
    """How much better each answer is than expected."""

    @property
    def needs_group(self) -> bool:
        """Whether an answer is compared with others to its prompt, so that there must be some."""
        return True

    def __call__(
        self, rewards: Real[np.ndarray, "prompts group"], is_valid: Valid
    ) -> Float[np.ndarray, "prompts group"]:
        """Computed in float64, whatever the rewards are: integers would swallow fractions."""
        return self.of(np.asarray(rewards, np.float64), is_valid).astype(np.float32)

    def over_tokens(
        self, advantages: Float[np.ndarray, "rows time"], is_counted: Bool[np.ndarray, "rows time"]
    ) -> Float[np.ndarray, "rows time"]:
        """What is done to the advantages of a batch's tokens, after the divergence is taken off each where it is."""
        return advantages

    @abstractmethod
    def of(self, rewards: Rewards, is_valid: Valid) -> Float[np.ndarray, "prompts group"]: ...


@config
class GroupNormalised(Advantage):
    """(r − mean of the group) / (deviation of the group + epsilon) (GRPO; Shao et al., 2024, section 4.1.2)."""

    epsilon: Number = 1e-4

    def __post_init__(self):
        require_range(self, "epsilon", at_least=0)

    def of(self, rewards, is_valid):
        deviations = [_deviation(group[valid]) for group, valid in zip(rewards, is_valid, strict=True)]
        return _divided(_centred(rewards, is_valid), np.array(deviations)[:, None] + float(self.epsilon))


@config
class GroupCentred(Advantage):
    """r − mean of the group: prompts whose rewards hardly differ don't weigh more (Dr. GRPO; Liu et al., 2025, section
    3.2)."""

    def of(self, rewards, is_valid):
        return _centred(rewards, is_valid)


@config
class BatchScaled(Advantage):
    """(r − mean of the group) / (deviation of all rewards of the batch + epsilon) (Liu et al., 2025, "Tricks
    or Traps? A deep dive into RL for LLM reasoning")."""

    epsilon: Number = 1e-4

    def __post_init__(self):
        require_range(self, "epsilon", at_least=0)

    def of(self, rewards, is_valid):
        return _divided(_centred(rewards, is_valid), _deviation(rewards[is_valid]) + float(self.epsilon))


@config
class LeaveOneOut(Advantage):
    """r − mean of the group's other rewards (RLOO; Ahmadian et al., 2024, eq. 9): n / (n − 1) · (r − mean).

    whitened: then over the batch minus the mean, divided by the deviation.
    """

    whitened: bool = False
    epsilon: Number = 1e-4

    def __post_init__(self):
        require_range(self, "epsilon", at_least=0)

    def of(self, rewards, is_valid):
        n = is_valid.sum(axis=1, keepdims=True)
        advantages = _centred(rewards, is_valid) * n / np.maximum(n - 1, 1)
        return whiten(advantages, is_valid, float(self.epsilon)) if self.whitened else advantages


@config
class BatchWhitened(Advantage):
    """(A − mean) / (deviation + epsilon), both over the batch's answer tokens, with A the reward (REINFORCE++; Hu,
    2025) or, centred, the reward minus its group's mean (REINFORCE++-baseline, there too)."""

    centred: bool = False
    epsilon: Number = 1e-8

    def __post_init__(self):
        require_range(self, "epsilon", at_least=0)

    @property
    def needs_group(self):
        return self.centred

    def of(self, rewards, is_valid):
        return _centred(rewards, is_valid) if self.centred else np.where(is_valid, rewards, 0.0)

    def over_tokens(self, advantages, is_counted):
        return whiten(advantages.astype(np.float64), is_counted, float(self.epsilon)).astype(np.float32)


@config
class Plain(Advantage):
    """The reward itself: no baseline (Williams, 1992)."""

    @property
    def needs_group(self):
        return False

    def of(self, rewards, is_valid):
        return np.where(is_valid, rewards, 0.0)


def whiten(
    values: Float[np.ndarray, "*shape"], is_counted: Bool[np.ndarray, "*shape"], epsilon: float
) -> Float[np.ndarray, "*shape"]:
    """Minus the mean, divided by the deviation + epsilon, both of those that count; the others become 0, and all where
    nothing differs."""
    known = values[is_counted]
    if known.size == 0 or known.max() == known.min():
        return np.zeros_like(values)
    scaled = _divided(values - known.mean(), _deviation(known) + epsilon)
    return np.where(is_counted, scaled, 0.0)
