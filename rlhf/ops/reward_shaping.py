"""What an answer's score becomes before it is a reward, and the coefficient that keeps a divergence at its target."""

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from rlhf.config import Number, config, require_range
from rlhf.ops.kl import InReward


@config
class Shaping:
    """In this order:

    missing_eos_penalty: taken off the score of an answer that was cut.
    normalised: minus the mean, divided by the standard deviation of all scores of the run so far, this batch's among
        them.
    scale: multiplies.
    clip: bounds at ± clip; null: no bound.
    """

    missing_eos_penalty: Number = 0.0
    normalised: bool = False
    scale: Number = 1.0
    clip: Number | None = None

    def __post_init__(self):
        require_range(self, "missing_eos_penalty", at_least=0)
        require_range(self, "scale", above=0)
        require_range(self, "clip", above=0)

    def __call__(
        self,
        scores: Float[np.ndarray, "answers"],
        is_truncated: Bool[np.ndarray, "answers"],
        is_valid: Bool[np.ndarray, "answers"],
        memory: MutableMapping[str, Any],
    ) -> Float[np.ndarray, "answers"]:
        """memory: keeps count, mean and squared deviations of the scores so far, under `scores_…`."""
        shaped = scores.astype(np.float64) - float(self.missing_eos_penalty) * is_truncated
        if self.normalised:
            count, mean, squares = _remember(shaped[is_valid], memory)
            deviation = np.sqrt(squares / count) if count > 1 and squares > 0 else 1.0
            shaped = (shaped - mean) / deviation
        shaped = shaped * float(self.scale)
        if self.clip is not None:
            shaped = np.clip(shaped, -float(self.clip), float(self.clip))
        return np.where(is_valid, shaped, 0.0).astype(np.float32)


def _remember(new: Float[np.ndarray, "some"], memory: MutableMapping[str, Any]) -> tuple[float, float, float]:
    """Count, mean and sum of squared deviations with the new scores (Chan et al., 1979, eq. 1.5)."""
    count, mean, squares = (float(memory.get(f"scores_{name}", 0.0)) for name in ("count", "mean", "squares"))
    if new.size:
        total, gap = count + new.size, float(new.mean()) - mean
        squares += float(((new - new.mean()) ** 2).sum()) + gap**2 * count * new.size / total
        mean += gap * new.size / total
        count = total
    for name, value in (("count", count), ("mean", mean), ("squares", squares)):
        memory[f"scores_{name}"] = np.asarray(value, np.float64)
    return count, mean, squares


@config
class Adaptive(InReward):
    """`InReward` whose coefficient follows the divergence: it grows while that is above its target and shrinks while it
    is below (Ziegler et al., 2019, section 2.2).

    coef: to begin with.
    target: divergence aimed at, nats per answer.
    horizon: answers in which the coefficient can grow or shrink by a fifth of itself.
    """

    target: Number = 6.0
    horizon: Number = 10_000.0

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "target", above=0)
        require_range(self, "horizon", above=0)

    def followed(self, coef: float, divergence: float, n_answers: int) -> float:
        """The next coefficient. divergence: of this batch, nats per answer."""
        error = float(np.clip(divergence / float(self.target) - 1, -0.2, 0.2))
        return coef * (1 + error * n_answers / float(self.horizon))
