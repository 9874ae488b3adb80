"""Measure a checkpoint on held-out rows: accuracy of generated answers, and the algorithm's own loss and metrics."""

import functools
import json
import logging
import statistics
from typing import Any

import jax
import numpy as np

from rlhf.build import Experiment
from rlhf.config import config
from rlhf.errors import ConfigError
from rlhf.sampling.evaluate import evaluate_prompts, interval
from rlhf.train.update import eager_measure, measure_all

log = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnames=("model",))
def _measure_each(params: Any, batch: dict[str, Any], algorithm: Any, *, model: Any) -> dict[str, jax.Array]:
    """Loss and metrics of each row as if it were alone."""
    scalars = {name: x for name, x in batch.items() if not x.ndim}
    rows = {name: x[:, None] for name, x in batch.items() if x.ndim}
    return jax.vmap(lambda one: eager_measure(params, {**one, **scalars}, algorithm, model=model))(rows)


@config
class Evaluate:
    """`rlhf task=evaluate model.checkpoint=… dataset=… [algorithm=…]`.

    reference: checkpoint that algorithms with a reference compare with; none takes what the run of model.checkpoint
        started from.

    Writes into the run's folder: `evaluation.json` (each number with n, shares with a 95 % interval), `rows.jsonl`
    (each answer) and `scored.jsonl` (each held-out row's own loss and metrics).
    """

    reference: str | None = None

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """Prompts with an answer give accuracies; rows of the algorithm's form give its loss and metrics.

        Raises:
            ConfigError: the evaluation split has neither.
        """
        result = self._answers(experiment) | self._metrics(experiment)
        if not result:
            raise ConfigError(
                "nothing to evaluate: the dataset has no evaluation split with answers or with rows to score"
            )
        result |= {"checkpoint": experiment.settings.model.checkpoint, "parameters": experiment.model.n_parameters()}
        path = experiment.folder / "evaluation.json"
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        for name, value in result.items():
            log.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
        log.info("written: %s", path)
        return result

    def _answers(self, experiment: Experiment) -> dict[str, Any]:
        settings = experiment.settings.evaluation
        prompts = experiment.prompts(settings.rows)
        if not prompts or any(prompt.answer is None for prompt in prompts):
            return {}
        summary, rows = evaluate_prompts(
            experiment.sampler, experiment.parameters, prompts, settings, experiment.settings.reward
        )
        with (experiment.folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return summary

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
        if "rewards/accuracies" in measured:
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
            values = jax.device_get(_measure_each(parameters, some, algorithm, model=experiment.model))
            for place, number in enumerate(numbers[start : start + size]):
                rows.append({"row": number} | {name: float(value[place]) for name, value in values.items()})
        with (experiment.folder / "scored.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return {name: statistics.fmean(row[name] for row in rows) for name in rows[0] if name != "row"}

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
        return experiment.load_or_draw(began["started_from"], began["seed"])
