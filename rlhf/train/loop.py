"""The loop: batch → prepare → update → log, with evaluation, samples, checkpoints and resume around it.

It calls an algorithm's `prepare` and, compiled, its `loss`; it knows nothing else about it. Metrics of a step are
fetched while the next one runs, so the device never waits for the log.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import processes
from rlhf.errors import TrainingError
from rlhf.model.sharding import place_rows, with_shardings
from rlhf.train import ahead, guard
from rlhf.train.best import Best
from rlhf.train.checkpoint import Checkpoints
from rlhf.train.job import Job
from rlhf.train.metrics import MetricsWriter, Progress, SamplesWriter, format_held_out, read_metrics
from rlhf.train.minibatches import joined, minibatches
from rlhf.train.processor import in_between
from rlhf.train.signals import StopSignals
from rlhf.train.update import eager_measure, eager_update, initial_state, measure, measure_all, update

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Pending:
    """A dispatched step whose numbers have not been fetched. ended: when it was done, if that was on its return.

    log: what the algorithm told of it. updating: when its first optimizer step was begun.
    """

    step: int
    started: float
    updating: float
    ended: float | None
    n_tokens: Any
    rows: np.ndarray
    metrics: list[dict[str, Any]]
    log: Any


class Trainer:
    """Runs a `Job` from its start or its newest checkpoint to its end."""

    def __init__(self, job: Job):
        self.job = job
        a = job.algorithm
        self.n_steps = job.settings.n_steps(job.batches.n_rows, a.batch_size)
        # A Python float and a float32 scalar would be two programs: convert once.
        self.algorithm = jax.tree.map(lambda x: jnp.float32(x) if isinstance(x, int | float) else x, a)
        self.update = eager_update if job.settings.eager else update
        self.measure = eager_measure if job.settings.eager else measure
        self.checkpoints = Checkpoints(job.folder / "checkpoints", job.settings.max_to_keep)
        self.state = initial_state(job.trainable, self.algorithm)
        self.start = self._restore() if job.resume else 0
        measured = {
            "trainer.eval_rows": job.settings.eval_rows,
            "evaluation": job.record.get("config", {}).get("evaluation"),
        }
        self.best = Best(job.folder, job.settings.best_metric, job.settings.best_is, self.start, measured)
        self.finished = 0.0  # when the numbers of the last step were there
        self.watch = guard.Watch(job.forbid_recompile)

    @property
    def params(self) -> dict[str, Any]:
        return {**self.job.frozen, **self.state["params"]}

    def _restore(self) -> int:
        if not self.checkpoints.steps():
            log.info("no checkpoint in %s yet: starting at step 0", self.checkpoints.folder)
            return 0
        memory = self.checkpoints.abstract("memory")
        if self.job.mesh is not None:
            memory = with_shardings(memory, self.job.mesh)
        target = {**self.state, "memory": memory}
        tree, record = self.checkpoints.restore(target, allow_older=self.job.settings.allow_older_checkpoint)
        if record["data"] != self.job.batches.fingerprint:
            raise TrainingError(
                f"the data changed since {self.checkpoints.folder} was written (fingerprint {record['data']}, now "
                f"{self.job.batches.fingerprint}): a run goes on only with the rows it began with"
            )
        self.job.runtime.memory.update(tree.pop("memory"))
        self.state = tree
        step = record["step"]
        is_done = f": all {step} of {self.n_steps} steps are done" if step >= self.n_steps else ""
        log.info("going on after step %d of %s%s", step, self.checkpoints.folder, is_done)
        return step

    def fit(self) -> tuple[dict[str, float], dict[str, float]]:
        """Train to the end; returns the metrics from before the first step and those of the last.

        Raises:
            TrainingError: a loss or gradient is not finite and `trainer.on_nonfinite` is `stop`.
        """
        job = self.job
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        with (
            MetricsWriter(job.folder, self.start) as self.writer,
            SamplesWriter(job.folder, self.start) as self.samples,
            Progress(self.n_steps, self.start) as self.progress,
            StopSignals() as signals,
        ):
            self.progress.headline = self.algorithm.headline
            if self.start == 0:
                first = self._first_look()
            pending = None
            for step in range(self.start, self.n_steps):
                with self.watch.part("a step"), self._telling(pending):
                    dispatched, done = self._step(step), step + 1
                last = self._finish(pending) or last
                pending = dispatched
                signals.received = processes.agreed_stop(done, signals.received)
                is_last, is_stopped = done == self.n_steps, signals.received is not None
                if is_last or is_stopped or self._pauses_after(done):
                    last, pending = self._pause(pending, is_last, is_stopped), None
                elif step == self.start:  # at once: one waits for the first row, not for speed
                    last, pending = self._finish(pending) or last, None
                if is_stopped and not is_last:
                    signals.leave(f"stopped after step {done}, checkpoint written; go on with resume={job.folder}")
        return first or self._stored(0), last or self._stored(self.n_steps)

    @contextlib.contextmanager
    def _telling(self, pending: _Pending | None) -> Iterator[None]:
        """What stops a step does not keep the one before it out of the log."""
        try:
            yield
        except Exception:
            with contextlib.suppress(TrainingError):
                self._finish(pending)
            raise

    def _stored(self, step: int) -> dict[str, float]:
        """A row that an earlier process of this run wrote."""
        return next((row for row in read_metrics(self.job.folder) if row["step"] == step), {})

    def _first_look(self) -> dict[str, float]:
        """Held-out metrics and samples of the model as it comes, as row 0."""

        def look() -> dict[str, float]:
            with self._update_compiling():
                return self._held_out_metrics(is_start=True)

        with self.watch.part("an evaluation"):
            metrics = self.job.first_look(look)
        if metrics:
            self.writer.write(0, metrics, {})
            log.info("step 0/%d  %s", self.n_steps, format_held_out(metrics))
        self.best.offer(0, metrics, self.state["params"], self._record(0))
        if self.job.settings.samples_every:
            self._sample(0)
        return metrics

    def _update_compiling(self) -> contextlib.AbstractContextManager:
        """Meanwhile the update is compiled, if there is time for it and its batch needs no answers to be written."""
        job, algorithm = self.job, self.algorithm
        has_time = job.held_out is not None or job.evaluate is not None
        if not has_time or algorithm.needs_reward or job.settings.eager or not ahead.is_possible():
            return contextlib.nullcontext()
        key = self._key(0)
        batch = self._prepared_apart(job.batches[0], key)
        part = place_rows(next(minibatches(batch, algorithm, key, job.is_noisy)), job.mesh)
        args = self.state, job.frozen, part, algorithm, self._n_updates()
        return ahead.compiled_meanwhile(self.update, *args, model=job.model, mesh=job.mesh)

    def _prepared_apart(self, batch: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """Rows that the run has not come to, prepared: they leave no trace in its memory nor in its log."""
        runtime, memory = self.job.runtime, dict(self.job.runtime.memory)
        prepared = self.algorithm.prepare(runtime, self.params, batch, key)
        runtime.memory.clear()
        runtime.memory.update(memory)
        runtime.log.take()
        return prepared

    def _key(self, step: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.job.seed), step)

    def _n_updates(self) -> jax.Array:
        return jnp.int32(self.n_steps * self.algorithm.epochs * self.algorithm.minibatches)

    def _step(self, step: int) -> _Pending:
        job, algorithm = self.job, self.algorithm
        started = time.perf_counter()
        key = self._key(step)
        batch = job.batches[step]
        rows = batch["row"]
        job.runtime.step = step
        with in_between(algorithm.needs_reward):
            batch = algorithm.prepare(job.runtime, self.params, batch, key)
        told, updating = job.runtime.log.take(), time.perf_counter()
        n_updates, metrics = self._n_updates(), []
        for part in minibatches(batch, algorithm, key, job.is_noisy):
            part = place_rows(part, job.mesh)
            self.state, one = self.update(
                self.state, job.frozen, part, algorithm, n_updates, model=job.model, mesh=job.mesh
            )
            metrics.append(one)
            if algorithm.stops_early and algorithm.is_far(jax.device_get(one)):
                break
        if step == 0 and self.start == 0:
            self._self_check(metrics[0])
        arrays = [x for x in jax.tree.leaves(metrics) if isinstance(x, jax.Array)]
        is_done = all(x.is_ready() for x in arrays)  # type: ignore[attr-defined]  # jax's types leave it out
        ended = time.perf_counter() if is_done else None
        n_tokens = (batch["segments"] > 0).sum()
        return _Pending(step + 1, started, updating, ended, n_tokens, rows, metrics, told)

    def _self_check(self, metrics: dict[str, Any]) -> None:
        """The loss of the first update against the closed form that the algorithm names, if it has one."""
        expected = self.job.algorithm.expected_first_loss()
        if expected is None or self.job.is_noisy:
            return
        found, tolerance = float(metrics["loss"]), 1e-5 if self.job.model.compute_dtype == "float32" else 2e-2
        if not math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance):
            raise TrainingError(
                f"self-check failed: the first loss is {found:.6f}, but with policy and reference equal it must be "
                f"{expected:.6f}; the loss, the reference or the batch is wrong"
            )
        log.info("self-check: first loss %.6f, expected %.6f: ok", found, expected)

    def _pauses_after(self, step: int) -> bool:
        s = self.job.settings
        return any(_due(step, every) for every in (s.eval_every, s.checkpoint_every, s.samples_every))

    def _pause(self, pending: _Pending, is_last: bool, is_stopped: bool) -> dict[str, float]:
        """Between two steps: evaluate, sample, save, as far as due. Rows are on the disk before their checkpoint."""
        settings, step = self.job.settings, pending.step
        metrics, times = self._fetch(pending)
        is_evaluated = is_last or _due(step, settings.eval_every)
        if is_evaluated:
            with self.watch.part("an evaluation"):
                metrics |= self._held_out_metrics()
        if is_evaluated or _due(step, settings.log_every):  # whatever stops a run adds no row that it would not have
            self._write(step, metrics, times)
        if _due(step, settings.samples_every):
            self._sample(step, pending.log.rollouts)
        if is_last:
            self._finish_components()
        if is_evaluated:
            self.best.offer(step, metrics, self.state["params"], self._record(step))
        if is_last or is_stopped or _due(step, settings.checkpoint_every):
            self._save(step)
        self.finished = time.perf_counter()
        return metrics

    def _sample(self, step: int, rollouts: Sequence[dict[str, Any]] = ()) -> None:
        """Texts for `samples.jsonl`, the log shows the first: what was trained on, and answers to held-out prompts."""
        with self.watch.part("samples of held-out prompts"):
            held_out = self.job.sample(self.params, step) if self.job.sample else []
        for kind, rows in (("rollout", list(rollouts)), ("sample", held_out)):
            self.samples.write(step, rows)
            for row in rows[: self.job.settings.n_samples]:
                texts = (f"  {name}: {value}" for name, value in row.items() if name not in ("step", "row"))
                log.info("%s of row %s\n%s", kind, row.get("row"), "\n".join(texts))

    def _finish(self, pending: _Pending | None) -> dict[str, float]:
        """Fetch and log the numbers of a step that nothing else follows."""
        if pending is None:
            return {}
        metrics, times = self._fetch(pending)
        if _due(pending.step, self.job.settings.log_every):
            self._write(pending.step, metrics, times)
        return metrics

    def _fetch(self, pending: _Pending) -> tuple[dict[str, float], dict[str, float]]:
        """Wait for a step; its metrics (the mean, where it had several updates) and its times."""
        fetched = jax.device_get(pending.metrics)
        metrics = joined(fetched)
        n_tokens, now = int(pending.n_tokens), pending.ended or time.perf_counter()
        seconds, self.finished = now - max(pending.started, self.finished), now
        self._check_finite(pending, metrics)
        metrics |= {"n_skipped": int(fetched[-1]["n_skipped"]), "n_tokens": n_tokens, **pending.log.metrics}
        times = {"seconds": seconds, "tokens_per_second": n_tokens / seconds, "perf/compilations": self.watch.n_late}
        if pending.log.times:
            times |= {**pending.log.times, "time/update_seconds": now - pending.updating}
        if self.algorithm.stops_early:
            metrics["n_updates"] = len(fetched)
        return metrics, times

    def _write(self, step: int, metrics: dict[str, float], times: dict[str, float]) -> None:
        self.writer.write(step, metrics, times)
        self.progress.update(step, metrics, times)

    def _check_finite(self, pending: _Pending, metrics: dict[str, float]) -> None:
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        if not bad:
            return
        steps = self.checkpoints.steps()
        last_good = str(self.checkpoints.folder / f"step_{steps[-1]}") if steps else "none yet"
        message = (
            f"{' and '.join(f'{name}={metrics[name]}' for name in bad)} at step {pending.step}; rows of the batch: "
            f"{sorted(pending.rows.tolist())}; last good checkpoint: {last_good}"
        )
        if self.job.settings.on_nonfinite == "stop":
            raise TrainingError(f"{message}. trainer.on_nonfinite=skip leaves such updates out and counts them")
        log.warning("%s; the update was skipped", message)

    @in_between()
    def _held_out_metrics(self, is_start: bool = False) -> dict[str, float]:
        """The algorithm's loss and metrics on held-out rows, and what else the job evaluates, as `val/…`."""
        job, metrics = self.job, {}
        if job.held_out is not None:
            prepared = self._prepared_apart(job.held_out, jax.random.key(job.seed))
            metrics = measure_all(self.params, prepared, self.algorithm, job.model, self.measure, job.mesh)
        if job.evaluate is not None:
            metrics |= job.evaluate(self.params, is_start)
        return {f"val/{name}": value for name, value in metrics.items()}

    def _finish_components(self) -> None:
        """What the algorithm changes of the parameters when all steps are done; logged, not in a step's row."""
        changed = self.algorithm.finish(self.job.runtime, self.params, self.job.seed)
        self.state = {**self.state, "params": {**self.state["params"], **changed}}
        for name, value in self.job.runtime.log.take().metrics.items():
            log.info("after the last step: %s %.6g", name, value)

    def _save(self, step: int) -> None:
        self.writer.flush()
        self.samples.flush()
        record = {**self._record(step), "compilations": guard.compilations()}
        self.checkpoints.save(step, {**self.state, "memory": self.job.runtime.memory}, record)

    def _record(self, step: int) -> dict[str, Any]:
        job = self.job
        return {**job.record, "step": step, "data": job.batches.fingerprint, "seed": job.seed}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
