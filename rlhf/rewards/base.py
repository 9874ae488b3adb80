"""What a reward is: texts in, one number each out."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answered:
    """One answer to judge.

    prompt: as the model saw it, control tokens spelt out. completion: the answer's text. reference: the right answer,
    where the dataset has one. fields: the row of the dataset. n_tokens: of the completion. is_truncated: it was cut.
    """

    prompt: str
    completion: str
    reference: str | None
    fields: Mapping[str, Any]
    n_tokens: int
    is_truncated: bool


class Reward:
    """Scores answers. A subclass is one file and one yaml; it may read anything of an `Answered` and nothing else."""

    @property
    def name(self) -> str:
        """Under which the log shows it."""
        return type(self).__name__.lower()

    @abstractmethod
    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        """One finite number per answer, in their order. step: of training, 0 outside it."""
