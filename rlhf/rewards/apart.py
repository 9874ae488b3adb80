"""Rewards that run in worker processes, since they run code or patterns that are not ours."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.config import config, require_range
from rlhf.rewards.base import Answered, Failed, Judgements, OnError, Reward, Scorer
from rlhf.rewards.pool import Call, Function, Limits, Pool


@config
class Apart(Reward):
    """A reward whose function is called in worker processes that stay between steps.

    timeout_seconds: for all answers of a step together: after it, what is not judged has failed.
    answers_per_call: so many answers are judged by one call; none: all of a step. One that fails takes the others of
        its call with it.
    call_seconds: for one call; none: timeout_seconds.
    start_seconds: to start a worker and import the function.
    workers: processes that share the calls.
    memory_gb: address space of a worker, in 10^9 bytes; none: no limit.
    on_error: `stop` the run with the reason, or `mask` the answers that failed, which then count nowhere.
    """

    timeout_seconds: float = 10.0
    answers_per_call: int | None = None
    call_seconds: float | None = None
    start_seconds: float = 60.0
    workers: int = 1
    memory_gb: float | None = None
    on_error: OnError = "stop"

    def __post_init__(self):
        require_range(self, "timeout_seconds", "call_seconds", "start_seconds", "memory_gb", above=0)
        require_range(self, "answers_per_call", "workers", at_least=1)

    @abstractmethod
    def target(self) -> tuple[Function, str]:
        """The function, and how messages name it."""

    @abstractmethod
    def arguments(self, answers: Sequence[Answered], step: int) -> tuple:
        """What it is called with for some answers; it returns one score for each."""

    def connect(self, load: Callable[[str], Any]) -> Scorer:
        return _InWorkers(self)

    def __call__(self, answers: Sequence[Answered], step: int) -> Judgements:
        """Judge in workers that end afterwards; `connect` gives what keeps them."""
        scorer = _InWorkers(self)
        try:
            return scorer(answers, step)
        finally:
            scorer.pool.close()


class _InWorkers(Scorer):
    def __init__(self, reward: Apart):
        self.reward = reward
        limits = Limits(reward.timeout_seconds, reward.call_seconds, reward.start_seconds, reward.memory_gb)
        function, what = reward.target()
        self.pool = Pool(function, what, limits, reward.workers)

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float | Failed]:
        size = self.reward.answers_per_call or max(len(answers), 1)
        parts = [answers[start : start + size] for start in range(0, len(answers), size)]
        found = self.pool.run([Call(self.reward.arguments(part, step), len(part)) for part in parts])
        return [score for part in found for score in part]
