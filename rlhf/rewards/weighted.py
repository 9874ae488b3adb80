"""The rewards of a run, added up: `reward=gsm8k`, or `reward=[gsm8k,length] reward.length.weight=0.1`.

The only caller of rewards: what one returns is checked here, and what goes wrong is named and counted.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf import processes
from rlhf.errors import ConfigError, TrainingError, UserError
from rlhf.rewards.base import Answered, Failed, Reward, Scorer, Scores
from rlhf.rewards.numbers import as_score
from rlhf.rewards.worker import told

log = logging.getLogger(__name__)


class Rewards:
    """A weighted sum of rewards by name. Call it with answers and the step: `rewards(answers, step) -> Scores`.

    Metrics: `rewards/<name>/mean` and `/std` (population) over the answers that the reward judged, unweighted, absent
    if there are none; `rewards/<name>/errors`, those it did not; `rewards/<name>/<key>`, what it tells of itself;
    `reward/mean` and `reward/std` of the sum, over valid answers.
    """

    def __init__(
        self,
        parts: Mapping[str, Reward],
        scorers: Mapping[str, Callable] | None = None,
        on_devices: Collection[str] = (),
    ):
        """
        scorers: what judges for each; by itself, the rewards. on_devices: names of those that run a model of ours, of
            which all processes of a run compute their part; any other judges in the first process alone.

        Raises:
            ConfigError: there is none, or a weight is not finite.
        """
        if not parts:
            raise ConfigError("reward: choose at least one, as reward=gsm8k or reward=[gsm8k,length]")
        for name, reward in parts.items():
            if not math.isfinite(reward.weight):
                raise ConfigError(f"reward.{name}.weight={reward.weight} must be finite")
        self.parts = dict(parts)
        self._scorers: dict[str, Callable] = dict(parts if scorers is None else scorers)
        self._on_devices = frozenset(on_devices)

    def connected(self, load: Callable[[str], Any]) -> "Rewards":
        """The same with the models loaded that some need; `load(checkpoint)` gives one (see `Reward.connect`)."""
        loading: set[str] = set()

        def noted(name: str, checkpoint: str) -> Any:
            loading.add(name)
            return load(checkpoint)

        scorers = {name: reward.connect(functools.partial(noted, name)) for name, reward in self.parts.items()}
        return Rewards(self.parts, scorers, loading)

    def __call__(self, answers: Sequence[Answered], step: int) -> Scores:
        """Scores of all answers.

        Raises:
            TrainingError: a reward failed and its `on_error` is `stop`; names the reward, the answer and the reason.
        """
        started = time.perf_counter()
        parts: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        times: dict[str, float] = {}
        total, is_valid = np.zeros(len(answers), np.float64), np.ones(len(answers), bool)
        for name, reward in self.parts.items():
            begun = time.perf_counter()
            values, reasons, told = self._agreed(name, answers, step)
            times[f"rewards/{name}/milliseconds"] = 1000 * (time.perf_counter() - begun)
            _tell(name, reasons, answers)
            metrics |= _summary(f"rewards/{name}", values)
            metrics[f"rewards/{name}/errors"] = float(len(reasons))
            metrics |= {f"rewards/{name}/{key}": value for key, value in told.items()}
            is_valid &= np.isfinite(values)
            total += reward.weight * np.nan_to_num(values, nan=0.0)
            parts[name] = values.astype(np.float32)
        total[~is_valid] = 0.0
        metrics |= _summary("reward", np.where(is_valid, total, np.nan))
        return Scores(total.astype(np.float32), parts, is_valid, metrics, time.perf_counter() - started, times)

    def _agreed(
        self, name: str, answers: Sequence[Answered], step: int
    ) -> tuple[Float[np.ndarray, "n"], dict[int, str], dict[str, float]]:
        """`_judge`, and what the scorer tells of itself: the same in all processes of a run."""

        def judge() -> tuple[list[float], list[tuple[int, str]], dict[str, float]]:
            values, reasons = self._judge(name, answers, step)
            scorer = self._scorers[name]
            told = scorer.metrics() if isinstance(scorer, Scorer) else {}
            return values.tolist(), list(reasons.items()), {key: float(value) for key, value in told.items()}

        found = judge() if name in self._on_devices else None
        values, reasons, told = processes.from_first(judge if found is None else lambda: found)
        return np.array(values, np.float64), {int(place): reason for place, reason in reasons}, told

    def _judge(
        self, name: str, answers: Sequence[Answered], step: int
    ) -> tuple[Float[np.ndarray, "n"], dict[int, str]]:
        """One reward's numbers, NaN where it failed, and the reasons by place."""
        reward, values, reasons = self.parts[name], np.full(len(answers), np.nan), {}
        for place, judgement in enumerate(self._judgements(name, answers, step)):
            found = judgement if isinstance(judgement, Failed) else as_score(judgement)
            if isinstance(found, float):
                values[place] = found
            else:
                reasons[place] = found.reason if isinstance(found, Failed) else f"its score {found}"
        if reasons and reward.on_error == "stop":
            place, reason = next(iter(reasons.items()))
            many = f" (and {len(reasons) - 1} more of {len(answers)})" if len(reasons) > 1 else ""
            raise TrainingError(f"reward {name} failed on {_shown(answers[place])}{many}: {reason}")
        return values, reasons

    def _judgements(self, name: str, answers: Sequence[Answered], step: int) -> Sequence[Any]:
        """What the reward returned, one for each answer; not checked yet."""
        try:
            found = self._scorers[name](answers, step)
            n_found = len(found)
        except UserError:
            raise
        except Exception as error:
            log.debug("reward %s", name, exc_info=True)
            reason = told(error)
            if self.parts[name].on_error == "stop":
                raise TrainingError(f"reward {name} failed on {len(answers)} answers: {reason}") from error
            return [Failed(reason)] * len(answers)
        if n_found != len(answers):
            reason = f"it gave {n_found} scores for {len(answers)} answers"
            return [Failed(reason)] * len(answers)
        return found


def _summary(name: str, values: Float[np.ndarray, "n"]) -> dict[str, float]:
    judged = values[np.isfinite(values)]
    return {f"{name}/mean": float(judged.mean()), f"{name}/std": float(judged.std())} if judged.size else {}


def _tell(name: str, reasons: Mapping[int, str], answers: Sequence[Answered]) -> None:
    """A line for each distinct reason, with one answer that it befell."""
    places: dict[str, list[int]] = {}
    for place, reason in reasons.items():
        places.setdefault(reason, []).append(place)
    for reason, befell in list(places.items())[:3]:
        log.warning(
            "reward %s: %d of %d answers masked, such as %s: %s",
            name, len(befell), len(answers), _shown(answers[befell[0]]), reason,
        )  # fmt: skip


def _shown(answer: Answered) -> str:
    text = answer.completion if len(answer.completion) <= 80 else answer.completion[:80] + "…"
    return f"row {answer.row} {text!r}"
