"""What becomes of answers that were cut or are nearly too long, as values."""

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError


class Truncation:
    """Changes rewards by length, and says which answers count."""

    def require_fits(self, max_new_tokens: int) -> None:
        """Refuse settings that the longest answer has no room for.

        Raises:
            ConfigError
        """

    def shaped(
        self,
        rewards: Float[np.ndarray, "rows"],
        n_tokens: Int[np.ndarray, "rows"],
        is_truncated: Bool[np.ndarray, "rows"],
        max_new_tokens: int,
    ) -> Float[np.ndarray, "rows"]:
        """The rewards that advantages are made of."""
        return rewards

    def is_kept(self, is_truncated: Bool[np.ndarray, "rows"]) -> Bool[np.ndarray, "rows"]:
        """Which answers have a loss; all of them are compared with each other."""
        return np.ones_like(is_truncated)


@config
class KeepTruncated(Truncation):
    """They are answers like others."""


@config
class MaskTruncated(Truncation):
    """They have no loss: whether they would have been right is not known (overlong filtering; Yu et al., 2025,
    section 3.4)."""

    def is_kept(self, is_truncated):
        return ~is_truncated


@config
class PenaliseTruncated(Truncation):
    """Their reward is less by `penalty`."""

    penalty: Number = 1.0

    def __post_init__(self):
        require_range(self, "penalty", at_least=0)

    def shaped(self, rewards, n_tokens, is_truncated, max_new_tokens):
        return rewards - np.float32(self.penalty) * is_truncated


@config
class SoftOverlong(Truncation):
    """In the last `buffer` tokens before the limit the reward falls linearly, by `penalty` at the limit, and by as much
    for a cut answer (DAPO; Yu et al., 2025, eq. 13).

    buffer: tokens; at most max_new_tokens.
    """

    buffer: int
    penalty: Number = 1.0

    def __post_init__(self):
        require_range(self, "buffer", at_least=1)
        require_range(self, "penalty", at_least=0)

    def require_fits(self, max_new_tokens):
        if self.buffer > max_new_tokens:
            raise ConfigError(
                f"algorithm.truncation.buffer={self.buffer} must be at most algorithm.max_new_tokens={max_new_tokens}"
            )

    def shaped(self, rewards, n_tokens, is_truncated, max_new_tokens):
        share = np.clip((n_tokens - (max_new_tokens - self.buffer)) / self.buffer, 0, 1)
        return rewards - np.float32(self.penalty) * np.where(is_truncated, 1.0, share).astype(np.float32)
