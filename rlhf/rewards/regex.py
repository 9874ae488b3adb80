"""A pattern of the user's as a reward, in a worker process: a pattern can take for ever on a text made for it."""

import re
from collections.abc import Sequence

from rlhf.config import config
from rlhf.errors import ConfigError
from rlhf.rewards.apart import Apart
from rlhf.rewards.base import Answered, OnError
from rlhf.rewards.pool import Function


@config
class Regex(Apart):
    """match: for an answer that the pattern is found in; no_match: for any other.

    pattern: a regular expression of Python; (?s) in front lets a dot stand for line ends, (?i) ignores case.
    is_whole: the pattern must match the whole answer, not a part of it.
    """

    pattern: str
    is_whole: bool = False
    match: float = 1.0
    no_match: float = 0.0
    answers_per_call: int | None = 1
    call_seconds: float | None = 1.0
    on_error: OnError = "mask"

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern={self.pattern!r} of Regex is no regular expression: {error}") from None

    def target(self):
        parameters = ("texts", "pattern", "is_whole", "scores")
        return Function("rlhf.rewards.checks.search", parameters), "reward.regex"

    def arguments(self, answers: Sequence[Answered], step: int):
        return [a.completion for a in answers], self.pattern, self.is_whole, (self.match, self.no_match)
