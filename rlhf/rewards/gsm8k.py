"""The rule reward of GSM8K: a right final number, or at least the right form."""

from collections.abc import Sequence

from rlhf.config import config, require_range
from rlhf.errors import ConfigError, DataError
from rlhf.rewards.answers import MARKER, final_answer, is_same_number, reference_answer
from rlhf.rewards.base import Answered, Reward


@config
class GSM8K(Reward):
    """correct: for the right number after the last marker; format: for another number there; wrong: for anything else.

    marker: what stands in front of the final number. window: only the last so many characters of an answer are read.
    """

    correct: float = 1.0
    format: float = 0.1
    wrong: float = 0.0
    marker: str = MARKER
    window: int = 300

    def __post_init__(self):
        require_range(self, "window", at_least=1)
        if not self.marker.strip():
            raise ConfigError("marker of GSM8K must not be blank")

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answered) -> float:
        if answer.reference is None:
            raise DataError("the reward gsm8k needs rows with a reference answer; this dataset's prompts have none")
        found = final_answer(answer.completion[-self.window :], self.marker)
        if found is None:
            return self.wrong
        return self.correct if is_same_number(found, reference_answer(answer.reference, self.marker)) else self.format
