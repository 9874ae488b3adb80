"""Advantages and returns of single tokens from a critic's values, and the critic's own loss.

What happens before an update (rewards, advantages, whitening) is numpy on the host; the loss is JAX.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf.config import Number

Tokens = Float[np.ndarray, "batch time"]
Mask = Bool[np.ndarray, "batch time"]


def last_of(is_answer: Mask) -> Mask:
    """The last answer token of each row that has one."""
    n_time = is_answer.shape[1]
    last = n_time - 1 - np.argmax(is_answer[:, ::-1], axis=1)
    return (np.arange(n_time) == last[:, None]) & is_answer


def token_rewards(scores: Float[np.ndarray, "batch"], penalty: Tokens, is_answer: Mask) -> Tokens:
    """What each token earns: the answer's score at its last token, less the penalty of each (Ziegler et al., 2019,
    eq. 2, token by token); 0 outside the answer."""
    return np.where(is_answer, -penalty, 0.0) + np.where(last_of(is_answer), scores[:, None], 0.0)


def generalized_advantage(rewards: Tokens, values: Tokens, is_answer: Mask, gamma: float, lam: float) -> Tokens:
    """Advantage of each answer token (Schulman et al., 2016, eq. 16); 0 outside the answer.

    values: at t, what is expected before the token at t is known. Nothing follows an answer's last token: the value
    behind it is 0.
    """
    advantages = np.zeros_like(rewards)
    later, next_value = np.zeros(len(rewards), rewards.dtype), np.zeros(len(rewards), rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # eq. 10
        later = np.where(is_answer[:, t], delta + gamma * lam * later, 0.0)
        next_value = np.where(is_answer[:, t], values[:, t], 0.0)
        advantages[:, t] = later
    return advantages


def whiten(values: Tokens, is_counted: Mask, keep_mean: bool = False, epsilon: float = 1e-8) -> Tokens:
    """(x − mean) / sqrt(variance + epsilon) over the tokens that count, the variance unbiased; 0 elsewhere.

    keep_mean: add the mean again: only the spread becomes 1. A single token, or equal ones, have no spread: they stay
    at the mean.
    """
    known = values[is_counted].astype(np.float64)
    mean = known.mean() if known.size else 0.0
    variance = known.var(ddof=1) if known.size > 1 else 0.0
    scaled = (values - mean) / np.sqrt(variance + epsilon) + (mean if keep_mean else 0.0)
    return np.where(is_counted, scaled, 0.0).astype(values.dtype)


def explained_variance(values: Tokens, returns: Tokens, is_counted: Mask) -> float:
    """1 − Var(returns − values) / Var(returns) over the tokens that count: 1 is a perfect critic, 0 one that knows the
    mean, below 0 one that is worse; 0 where returns do not vary."""
    wanted, found = returns[is_counted].astype(np.float64), values[is_counted].astype(np.float64)
    if wanted.size < 2 or wanted.var() == 0:
        return 0.0
    return float(1 - (wanted - found).var() / wanted.var())


def value_losses(
    values: Float[Array, "batch time"],
    old_values: Float[Array, "batch time"],
    returns: Float[Array, "batch time"],
    clip: Number | None,
) -> tuple[Float[Array, "batch time"], Bool[Array, "batch time"]]:
    """Half the squared error of each value, and where clipping decides.

    clip: the larger error counts of the value and of the value moved at most so far from the old one (Schulman's
    implementation of PPO; written out in Huang et al., 2022, "The 37 implementation details of PPO", 9); None: plain.
    """
    error = (values - returns) ** 2
    if clip is None:
        return error / 2, jnp.zeros(values.shape, bool)
    bounded = (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
    return jnp.maximum(error, bounded) / 2, bounded > error
