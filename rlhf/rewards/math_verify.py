"""Mathematical equality by the library math-verify: fractions, roots, intervals, sets, LaTeX."""

from collections.abc import Sequence

from rlhf.config import config, require_range
from rlhf.errors import DataError
from rlhf.rewards.apart import Apart
from rlhf.rewards.base import Answered, OnError
from rlhf.rewards.pool import Function


@config
class MathVerify(Apart):
    """correct: for an answer equal to the reference; wrong: for another one; unreadable: for a text without one.

    window: only the last so many characters of an answer are read.
    The others are those of `Apart`: expressions that take for ever to compare are made by models too.
    """

    correct: float = 1.0
    wrong: float = 0.0
    unreadable: float = 0.0
    window: int = 2000
    answers_per_call: int | None = 1
    call_seconds: float | None = 2.0
    workers: int = 2
    memory_gb: float | None = 4.0
    on_error: OnError = "mask"

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "window", at_least=1)

    def target(self):
        parameters = ("texts", "references", "scores")
        return Function("rlhf.rewards.math_checks.verify_math", parameters), "reward.math_verify"

    def arguments(self, answers: Sequence[Answered], step: int):
        for answer in answers:
            if answer.reference is None:
                raise DataError(f"the reward math_verify needs reference answers; row {answer.row} has none")
        texts = [answer.completion[-self.window :] for answer in answers]
        return texts, [answer.reference for answer in answers], (self.correct, self.wrong, self.unreadable)
