"""What a reward is: texts in, one number each out; and what becomes of several rewards together.

A reward is a subclass of `Reward` in a file of its own. `rlhf.rewards.weighted.Rewards` adds several up, checks what
they return, counts what goes wrong and measures their time; nothing else calls a reward.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32

from rlhf.config import config


@dataclasses.dataclass(frozen=True)
class Answered:
    """One answer to judge.

    prompt: as the model saw it, control tokens spelt out. completion: the answer's text. reference: the right answer,
    where the dataset has one. fields: the row of the dataset. n_tokens: of the completion, the stop token included.
    is_truncated: it was cut. row: index of the prompt in the dataset. prompt_ids, answer_ids: the tokens of both, the
    stop token included; empty where only texts are known.
    """

    prompt: str
    completion: str
    reference: str | None
    fields: Mapping[str, Any]
    n_tokens: int
    is_truncated: bool
    row: int = 0
    prompt_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Failed:
    """In the place of a score: this answer could not be judged, and why."""

    reason: str


Judgements = Sequence[float | Failed]
OnError = Literal["stop", "mask"]


class Scorer:
    """What scores answers."""

    @abstractmethod
    def __call__(self, answers: Sequence[Answered], step: int) -> Judgements:
        """One finite number (or `Failed`) per answer, in their order. step: of training, 0 outside it."""

    def metrics(self) -> Mapping[str, float]:
        """Further numbers about the last call, logged as `rewards/<name>/<key>`."""
        return {}


@config
class Reward(Scorer):
    """Scores answers. A subclass is one file and one yaml; it may read anything of an `Answered` and nothing else.

    weight: of this reward in the sum of all that are chosen.
    """

    # What a failed answer does: `stop` the run with the reason, or `mask` the answer, which then counts in no mean and
    # no gradient. A subclass that can fail makes it a setting by annotating it.
    on_error = "stop"

    weight: float = 1.0

    def connect(self, load: Callable[[str], Any]) -> Callable[[Sequence[Answered], int], Judgements]:
        """What scores: a `Scorer`, or any function like one. Called once, before the first answers; a reward that needs
        a model loads it here.

        load: `load(checkpoint)` gives a `rlhf.train.loaded.Loaded` (model, params, others, tokenizer, sampler, mesh).
        """
        return self


@dataclasses.dataclass(frozen=True)
class Scores:
    """What several rewards say of n answers.

    total: weighted sum; 0 where `is_valid` is false. parts: of each reward by name, unweighted; NaN where it failed.
    is_valid: whether every reward has judged the answer; one that is not must count nowhere. metrics: for the log.
    seconds: wall time. times: of each reward, `rewards/<name>/milliseconds`; not the same in two equal runs.
    """

    total: Float32[np.ndarray, "n"]
    parts: Mapping[str, Float32[np.ndarray, "n"]]
    is_valid: Bool[np.ndarray, "n"]
    metrics: Mapping[str, float]
    seconds: float
    times: Mapping[str, float]
