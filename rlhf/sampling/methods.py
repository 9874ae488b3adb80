"""How the next token is chosen from its logits: methods as values.

Every method that draws is a `Sample`, whose numbers are data of the compiled program, one of each for every row: one
program serves greedy decoding and every mixture of temperature, top-k, top-p, min-p and repetition penalty, also within
one batch. `rlhf.sampling.draw` does what they say.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError


class Method:
    """A way to choose tokens."""

    @abstractmethod
    def as_sample(self) -> "Sample":
        """The numbers of the compiled program."""


@config
class Greedy(Method):
    """Always the most likely token; of equal ones the first."""

    def as_sample(self) -> "Sample":
        return Sample(temperature=0.0)


@config
class Sample(Method):
    """Draw from softmax(logits / temperature), restricted by what is set of the others, in this order.

    repetition_penalty: logits of tokens that prompt or answer hold already are divided by it where positive, multiplied
        where negative (Keskar et al., 2019, section 4.1); 1 changes nothing.
    temperature: 1 is the model's own distribution, 0 is greedy.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: of what top_k left, keep the most likely tokens up to and with the one that brings their share to top_p
        (Holtzman et al., 2020, section 3.1). 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al., 2024, section 3); 0 keeps
        all.
    """

    temperature: Number = 1.0
    top_k: Number = 0.0
    top_p: Number = 1.0
    min_p: Number = 0.0
    repetition_penalty: Number = 1.0

    def __post_init__(self):
        require_range(self, "temperature", at_least=0)
        require_range(self, "top_k", at_least=0)
        require_range(self, "top_p", above=0, at_most=1)
        require_range(self, "min_p", at_least=0, at_most=1)
        require_range(self, "repetition_penalty", above=0)
        if isinstance(self.top_k, float | int) and self.top_k != int(self.top_k):
            raise ConfigError(f"top_k={self.top_k!r} of Sample must be a whole number")

    def as_sample(self) -> "Sample":
        return self


@config
class Beam(Method):
    """Beam search: the answer of the greatest log-probability / tokens ** length_penalty that is found.

    width: beginnings of an answer that are kept at every token.
    length_penalty: 0 compares sums of log-probabilities, which favours short answers, 1 means per token.
    """

    width: int = 4
    length_penalty: Number = 1.0

    def __post_init__(self):
        require_range(self, "width", at_least=1)
        require_range(self, "length_penalty", at_least=0)

    def as_sample(self) -> Sample:
        raise ConfigError("Beam searches and does not draw: it can't be mixed with other methods or ask for n samples")


class Numbers(NamedTuple):
    """A `Sample` for each row."""

    temperature: Float[Any, "rows"]
    top_k: Float[Any, "rows"]
    top_p: Float[Any, "rows"]
    min_p: Float[Any, "rows"]
    repetition_penalty: Float[Any, "rows"]


def numbers_of(methods: Sequence[Method]) -> Numbers:
    """One row for each method; numbers that a computation made are fetched."""
    samples = [method.as_sample() for method in methods]
    return Numbers(*(np.array([float(getattr(s, name)) for s in samples], np.float32) for name in Numbers._fields))
