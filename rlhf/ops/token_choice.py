"""Which tokens of the answers the policy is trained on, as values."""

from abc import abstractmethod

import numpy as np
from jaxtyping import Bool, Float

from rlhf.config import Number, config, require_range


class TokenChoice:
    """Chooses among the answer tokens of a whole batch; the divergence from the reference counts for all of them."""

    @abstractmethod
    def __call__(
        self, is_answer: Bool[np.ndarray, "batch time"], entropy: Float[np.ndarray, "batch time"]
    ) -> Float[np.ndarray, "batch time"]:
        """1 for the chosen, 0 elsewhere. entropy: of the distribution that each token was drawn from, nats."""


@config
class AllTokens(TokenChoice):
    """Every one."""

    def __call__(self, is_answer, entropy):
        return is_answer.astype(np.float32)


@config
class HighEntropy(TokenChoice):
    """Those drawn from the distributions of highest entropy, where reasoning forks (Wang et al., 2025, "Beyond the
    80/20 rule").

    share: of the batch's answer tokens.
    """

    share: Number = 0.2

    def __post_init__(self):
        require_range(self, "share", above=0, at_most=1)

    def __call__(self, is_answer, entropy):
        if not is_answer.any():
            return np.zeros(is_answer.shape, np.float32)
        least = np.quantile(entropy[is_answer], 1 - float(self.share))
        return (is_answer & (entropy >= least)).astype(np.float32)
