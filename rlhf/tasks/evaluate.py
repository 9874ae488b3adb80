"""Measure a checkpoint on held-out rows: accuracy of generated answers, and the algorithm's own loss and metrics."""

import functools
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf import processes
from rlhf.build import Experiment
from rlhf.config import config
from rlhf.data.rows import take
from rlhf.errors import ConfigError
from rlhf.model.sharding import whole
from rlhf.sampling.evaluate import evaluate_prompts, interval
from rlhf.sampling.presets import method_name
from rlhf.sampling.sampler import show_prompt
from rlhf.train.checkpoint import moved_along
from rlhf.train.update import eager_measure, measure_all

log = logging.getLogger(__name__)

RESULT, ROWS = "evaluation.json", "rows.jsonl"


@functools.partial(jax.jit, static_argnames=("model",))
def _measure_each(params: Any, batch: dict[str, Any], algorithm: Any, *, model: Any) -> dict[str, jax.Array]:
    """Loss and metrics of each row as if it were alone."""
    scalars = {name: x for name, x in batch.items() if not x.ndim}
    rows = {name: x[:, None] for name, x in batch.items() if x.ndim}
    return jax.vmap(lambda one: eager_measure(params, {**one, **scalars}, algorithm, model=model))(rows)


@config
class Evaluate:
    """`rlhf task=evaluate model.checkpoint=… dataset=… [reward=…] [algorithm=…]`.

    reference: checkpoint that algorithms with a reference compare with; none takes what the run of model.checkpoint
        started from.
    group_by: column of the dataset; what an algorithm says of its held-out rows, it also says by the column's values.

    Writes into the run's folder: `evaluation.json` (each number with n, shares with a 95 % interval, and how answers
    were generated and read), `rows.jsonl` (each answer) and `scored.jsonl` (each held-out row's own loss and metrics).
    """

    reference: str | None = None
    group_by: str | None = None

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """Prompts with an answer, or with a reward, give accuracies and rewards; rows of the algorithm's form give its
        loss and metrics.

        Raises:
            ConfigError: the evaluation split has neither.
        """
        result = answers_measured(experiment) | self._metrics(experiment)
        if not result:
            raise ConfigError(
                "nothing to evaluate: the dataset has no evaluation split with answers, or with rows to score; "
                "prompts without answers need a reward=…"
            )
        result |= {"checkpoint": experiment.settings.model.checkpoint, "parameters": experiment.model.n_parameters()}
        path = experiment.folder / RESULT
        _write(path, result)
        for name, value in result.items():
            if name != "example":
                log.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
        log.info("written: %s", path)
        return {name: value for name, value in result.items() if name == "checkpoint" or isinstance(value, int | float)}

    def _metrics(self, experiment: Experiment) -> dict[str, Any]:
        """The loss and metrics that training logs as `val/…`; preference accuracy gets its interval."""
        held_out = experiment.held_out()
        if held_out is None:
            return {}
        algorithm, parameters = experiment.settings.algorithm, experiment.parameters
        start = self._start(experiment) if algorithm.needs_reference else {}
        runtime = experiment.runtime(start, None, held_out)
        prepared = algorithm.prepare(runtime, parameters, held_out, jax.random.key(experiment.settings.seed))
        n = len(held_out["row"])
        if algorithm.needs_whole_batch:
            measured: dict[str, Any] = measure_all(parameters, prepared, algorithm, experiment.model)
        else:
            measured = self._by_row(experiment, parameters, prepared)
        if "rewards/accuracies" in measured and "rewards/accuracies_low" not in measured:
            low, high = interval(round(measured["rewards/accuracies"] * n), n)
            measured |= {"rewards/accuracies_low": low, "rewards/accuracies_high": high}
        return {**measured, "n_scored": n}

    def _by_row(self, experiment: Experiment, parameters: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
        """Every row's own numbers, kept in `scored.jsonl`; a metric is the mean of its values there."""
        algorithm, numbers, rows = experiment.settings.algorithm, prepared["row"].tolist(), []
        size = min(algorithm.microbatch_size, len(numbers))
        for start in range(0, len(numbers), size):
            places = np.minimum(np.arange(start, start + size), len(numbers) - 1)  # the last part is filled up
            some = {name: x[places] if x.ndim else x for name, x in prepared.items()}
            values = jax.device_get(whole(_measure_each(parameters, some, algorithm, model=experiment.model)))
            for place, number in enumerate(numbers[start : start + size]):
                rows.append({"row": number} | {name: float(value[place]) for name, value in values.items()})
        _write_rows(experiment.folder / "scored.jsonl", rows)
        means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0] if name != "row"}
        return means | algorithm.report(rows, self._groups(experiment, numbers), parameters)

    def _groups(self, experiment: Experiment, rows: list[int]) -> list[str] | None:
        """What each row is counted under."""
        if self.group_by is None:
            return None
        sources = experiment.examples("eval", experiment.settings.algorithm.form).sources
        return [str(take(sources[row].fields, self.group_by)) for row in rows]

    def _start(self, experiment: Experiment) -> dict[str, Any]:
        checkpoint = experiment.settings.model.checkpoint
        if self.reference is not None:
            return experiment.load_or_draw(self.reference, 0)
        if checkpoint is None:
            return experiment.parameters
        began = getattr(experiment.source, "record", None)
        if began is None:
            raise ConfigError(
                f"model.checkpoint={checkpoint} is no run of this library, so what it started from is not known: give "
                "task.reference=…, the checkpoint that the algorithm's reference has"
            )
        log.info("reference: what %s started from", checkpoint)
        start = began["started_from"]
        if start is not None:
            source: Any = experiment.source
            start = moved_along(start, source.path)
        return experiment.load_or_draw(start, began["seed"])


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if not processes.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def answers_measured(experiment: Experiment, with_reward: bool = True) -> dict[str, Any]:
    """Answers of the experiment's model to the evaluation split, judged and written to `rows.jsonl`; their summary and
    how they were made. Nothing where prompts have no answers and there is no reward.

    with_reward: whether the reward scores them here; if not, prompts without answers are answered all the same.
    """
    settings, reward = experiment.settings.evaluation, experiment.reward if with_reward else None
    prompts = experiment.prompts(settings.rows)
    is_judged = bool(prompts) and all(prompt.answer is not None for prompt in prompts or [])
    if not prompts or (with_reward and reward is None and not is_judged):
        return {}
    params = experiment.parameters
    summary, rows = evaluate_prompts(experiment.sampler, params, prompts, settings, reward, is_judged)
    _write_rows(experiment.folder / ROWS, rows)
    result = summary | {
        "generation": method_name(settings.drawn_by),
        "passes": settings.passes,
        "max_new_tokens": settings.max_new_tokens,
        "extractor": repr(settings.reader) if "accuracy" in summary else None,
        "template": "Gemma 3 turns",
        "system_prompt": getattr(experiment.settings.dataset, "system_prompt", None),  # of one of several sources
        "example": show_prompt(experiment.tokenizer, prompts[0]),
    }
    _write(experiment.folder / RESULT, result)
    return result


def _write(path: Path, result: dict[str, Any]) -> None:
    if processes.is_first():
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
