"""From the sections of a config to the parts of a run: wiring, no maths."""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from omegaconf import DictConfig

from rlhf import processes, records
from rlhf.algorithms.base import Runtime
from rlhf.algorithms.reference import LiveReference, Remembered, without_adapter
from rlhf.algorithms.reference_cache import digest_of
from rlhf.algorithms.rollouts import Online
from rlhf.data.batches import Batches, collate, eval_batches, more_prompts
from rlhf.data.dataset import Part
from rlhf.data.encode import Examples, Prompt
from rlhf.data.examples import Form
from rlhf.errors import ConfigError, FolderInUse
from rlhf.model.gemma3 import Gemma3
from rlhf.model.sharding import place_rows
from rlhf.model.tokenizer import EMBEDDED, Tokenizer
from rlhf.rewards.weighted import Rewards
from rlhf.sampling.evaluate import evaluate_prompts
from rlhf.sampling.sampler import Sampler
from rlhf.sampling.samples import sample_rows
from rlhf.sampling.shapes import Use
from rlhf.sections import settings
from rlhf.train.adapters import AdapterRun, Beginning, begin
from rlhf.train.checkpoint import Checkpoints
from rlhf.train.drawn import Drawn
from rlhf.train.job import Job
from rlhf.train.loaded import Loaded, load_model
from rlhf.train.sources import Source, locate

log = logging.getLogger(__name__)

_kept: dict[Any, tuple[Any, Any]] = {}  # weights and data that further runs of this process use again
_UPDATE = ("learning_rate", "optimizer", "schedule", "clip_norm")  # of an algorithm: no metric depends on them


class Experiment:
    """The parts of one run, each built when it is first asked for.

    keep: weights and data are kept for further runs of this process (a sweep), so they are never given away to be
        overwritten.
    """

    def __init__(self, cfg: DictConfig, folder: Path, keep: bool = False):
        self.cfg, self.folder, self.keep = cfg, folder, keep
        self._loaded = _kept if keep else {}
        self.settings = settings(cfg)
        self.mesh = self.settings.hardware.start()

    @functools.cached_property
    def model(self) -> Gemma3:
        return self.settings.hardware.model(self.settings.model.architecture(), self.mesh)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        path = self._tokenizer_path()
        tokenizer = self._once("tokenizer", path, lambda: Tokenizer(path))
        if tokenizer.n_vocab > self.settings.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={self.settings.model.vocab_size} must be at least the {tokenizer.n_vocab} pieces of "
                f"{tokenizer.path}"
            )
        return tokenizer

    def _tokenizer_path(self) -> str | Path | None:
        """The one that is set, or the checkpoint's, or (None) the embedded one, where a run or nothing came before."""
        m = self.settings.model
        if m.tokenizer is not None or self.source is None:
            return m.tokenizer
        if self.source.tokenizer is not None:
            log.info("tokenizer: %s, of the checkpoint", self.source.tokenizer)
        elif self.source.needs_tokenizer:
            raise ConfigError(
                f"model.checkpoint={m.checkpoint} has no tokenizer.model beside it: give one as model.tokenizer=…"
            )
        return self.source.tokenizer

    @functools.cached_property
    def source(self) -> Source | None:
        """What `model.checkpoint` is; fetched if it is not here."""
        m = self.settings.model
        return None if m.checkpoint is None else locate(m.checkpoint, m.download_timeout)

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """Components by name; from the checkpoint, or at random where none is given. The base is one for all runs of
        this process that have the same, whatever adapters they train."""
        m, h, begun = self.settings.model, self.settings.hardware, self.beginning
        start = (m.checkpoint, m.adapter, begun.adapter is not None, self.settings.seed if m.checkpoint is None else 0)
        key = (m.architecture(), start, m.base_quantisation, h.param_dtype, h.mesh)
        load = functools.partial(begun.load_base, m.architecture(), h.param_dtype, self.mesh)
        base = self._once("parameters", key, load)
        return {**base, **begun.adapter_components(m.architecture(), self.settings.seed, self.mesh)}

    @functools.cached_property
    def beginning(self) -> Beginning:
        """Which parameters, and which adapter on them, the run begins with."""
        m = self.settings.model
        source = self.source or Drawn(self.settings.seed)
        find = functools.partial(locate, timeout_seconds=m.download_timeout)
        return begin(source, m.trained_lora, m.base_quantisation, m.adapter, m.architecture(), find)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """What generates: for evaluation, samples and rollouts."""
        return Sampler(self.model, self.tokenizer, self.settings.sampling, self.settings.seed)

    @functools.cached_property
    def reward(self) -> Rewards | None:
        """What scores answers, with the models loaded that it needs."""
        chosen = self.settings.reward
        return None if chosen is None else chosen.connected(self.load_model)

    def load_model(self, checkpoint: str) -> Loaded:
        """A model beside the run's own; kept for further runs of this process as weights are."""
        m, h = self.settings.model, self.settings.hardware
        key = (checkpoint, m.architecture(), h)
        return self._once(f"model {checkpoint}", key, lambda: load_model(checkpoint, m, h, self.mesh))

    def load_or_draw(self, checkpoint: str | None, seed: int) -> dict[str, Any]:
        """The parameters of a checkpoint, or random ones where none is given."""
        m = self.settings.model
        source = Drawn(seed) if checkpoint is None else locate(checkpoint, m.download_timeout)
        return source.load(m.architecture(), self.settings.hardware.param_dtype, self.mesh)

    def start_of(self, checkpoint: str) -> dict[str, Any]:
        """The parameters that a further component begins with; beside them the adapter alone of a run that trained one
        of the shape of this run's on the same base."""
        m, source = self.settings.model, locate(checkpoint, self.settings.model.download_timeout)
        loaded = self.load_or_draw(checkpoint, self.settings.seed)
        if not isinstance(source, AdapterRun) or m.trained_lora is None or not m.trained_lora.is_like(source.lora):
            return loaded
        if (source.record["base"], source.quantisation) != (self.beginning.base.digest(), m.base_quantisation):
            return loaded
        return {**loaded, "adapter": source.load_adapter(m.architecture(), self.mesh)}

    def examples(self, part: Part, form: Form) -> Examples:
        data, vision = self.settings.dataset, self.settings.model.architecture().vision
        key = (data, self.tokenizer.path, vision)
        return self._once(f"{part} {form}", key, lambda: data.load(part, form, self.tokenizer, vision))

    def _once(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """What was made under this name, if it was from the same key; of each name only the newest is in memory."""
        if name not in self._loaded or self._loaded[name][0] != key:
            self._loaded.pop(name, None)  # let go of before the next is made
            self._loaded[name] = (key, make())
        return self._loaded[name][1]

    @functools.cached_property
    def reference_key(self) -> dict[str, str]:
        """What reference log-probabilities depend on besides the rows, as text."""
        m = self.settings.model
        return {"model": f"{m.architecture()} {self.settings.hardware.compute_dtype}", **self.beginning.identity()}

    def training_job(self) -> Job:
        """Everything a `Trainer` needs, with the data read, the weights loaded and the summary logged."""
        s, resume = self.settings, processes.from_first(self._claim_folder)
        batches = Batches(self.examples("train", s.algorithm.form), s.algorithm.batch_size, s.seed)
        held_out, parameters = self.held_out(), self.parameters
        if self.tokenizer.path != EMBEDDED:
            records.keep(self.tokenizer.path, self.folder / "tokenizer.model")
        is_new = self.beginning.adapter is None  # one that changes nothing yet: the reference does without
        runtime = self.runtime(without_adapter(parameters) if is_new else parameters, batches, held_out)
        if isinstance(s.algorithm, Online):
            self.sampler.expect(*self._uses(s.algorithm, batches.examples.prompts))
            held = "on the policy's own base" if "adapter" in parameters else "a copy of the weights"
            log.info("reference: %s", held if s.algorithm.needs_reference else "none is loaded")
        further = s.algorithm.components(parameters, self.start_of, s.seed)
        is_shared = self.keep or isinstance(runtime.reference, LiveReference) or bool(further)
        trainable, frozen = self._divided(parameters)
        trainable |= further
        job = Job(
            folder=self.folder,
            model=self.model,
            algorithm=s.algorithm,
            runtime=runtime,
            trainable=_copied(trainable) if is_shared else trainable,  # an update consumes it
            frozen=frozen,
            batches=batches,
            held_out=held_out,
            settings=s.trainer,
            seed=s.seed,
            record=self._record(resume),
            mesh=self.mesh,
            evaluate=self._accuracy_measure(),
            sample=self._sampler(),
            first_look=self._first_look,
            resume=resume,
            forbid_recompile=s.hardware.forbid_recompile,
            is_noisy="adapter_dropout" in frozen,
        )
        for line in records.summary(job):
            log.info("%s", line)
        return job

    def _uses(self, algorithm: Online, prompts: list[Prompt]) -> list[Use]:
        """What an online run asks of the sampler, so that few shapes serve all of it: rollouts, accuracy, samples."""
        s = self.settings
        slots, most = s.sampling.slots, s.evaluation.max_new_tokens
        uses = [Use.of(prompts, algorithm.batch_size, algorithm.max_new_tokens, algorithm.group_size, slots)]
        if held_out := self.prompts(s.evaluation.rows):
            uses.append(Use.of(held_out, len(held_out), most, s.evaluation.passes, s.evaluation.batch_size))
        if s.trainer.samples_every and (shown := self.prompts(s.trainer.n_samples)):
            uses.append(Use.of(shown, 2 * len(shown), most, 1, slots))
        return uses

    def _divided(self, parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The components that are trained, and the others."""
        m = self.settings.model
        trained = ({"model"} if m.trained_lora is None else {"adapter"}) | ({"vision"} if m.train_vision else set())
        return (
            {name: tree for name, tree in parameters.items() if name in trained},
            {name: tree for name, tree in parameters.items() if name not in trained},
        )

    def _record(self, resume: bool) -> dict[str, Any]:
        """What a checkpoint says of the run: its config and where the parameters come from, from whichever folder and
        whenever it is read later. One with an adapter alone also has what tells its base from any other."""
        start = None if self.source is None else self.source.pinned
        record = {"config": records.resolved(self.cfg), "started_from": start}
        if self.settings.model.trained_lora is None:
            return record
        if resume:
            self.beginning.require_same_base(self.folder)
        return {**record, "base": self.beginning.base.digest()}

    def _claim_folder(self) -> bool:
        """Whether a run in the folder is to be gone on with.

        A run that ended before its first step, over a mistake in its settings or data, leaves nothing to go on with:
        the folder is as good as new.

        Raises:
            FolderInUse: a run is there and `resume` is not given, or its config differs where the result would.
        """
        wanted, stored = self.cfg.resume is not None, records.stored_config(self.folder)
        rows, checkpoints = self.folder / "metrics.jsonl", Checkpoints(self.folder / "checkpoints", 1)
        has_checkpoint = bool(checkpoints.steps())
        if not wanted and (has_checkpoint or (rows.is_file() and rows.stat().st_size)):
            raise FolderInUse(
                f"{self.folder} holds a run; resume=auto goes on with it, or choose another hydra.run.dir"
            )
        if stored is None and self.cfg.resume not in (None, "auto"):
            raise ConfigError(f"resume={self.cfg.resume}: there is no run in this folder")
        if stored is not None and has_checkpoint:
            records.require_same_run(stored, records.resolved(self.cfg), self.folder)
        else:
            records.store_config(self.folder, self.cfg)
        return wanted and stored is not None

    def held_out(self) -> dict[str, Any] | None:
        """The rows that `val/…` metrics are measured on, as one batch."""
        s = self.settings
        if not s.trainer.eval_rows or s.algorithm.form == "prompt" or not s.dataset.has_eval():
            return None
        examples = self.examples("eval", s.algorithm.form)
        return next(eval_batches(examples, min(s.trainer.eval_rows, len(examples))))

    def runtime(self, start: dict[str, Any], batches: Batches | None, held_out: dict[str, Any] | None) -> Runtime:
        """What `prepare` may use; the reference, where there is one, has the parameters `start`."""
        s = self.settings
        runtime = Runtime(self.model, self.tokenizer, generate=self.sampler, reward=self.reward)
        runtime.examples = None if batches is None else batches.examples
        runtime.n_row_shards = s.hardware.n_row_shards
        if s.algorithm.form == "prompt" and batches is not None:
            runtime.prompts, runtime.more_prompts = batches.examples, more_prompts(batches.examples, s.seed)
        if not s.algorithm.needs_reference:
            return runtime
        place_inputs = functools.partial(place_rows, mesh=self.mesh)
        key = {**self.reference_key, "data": "none" if batches is None else batches.fingerprint}
        rows = s.algorithm.microbatch_size
        live = LiveReference(self.model, start, rows, place_inputs, self._remembered((key, rows, s.hardware.mesh)))
        if batches is None:
            runtime.reference = live
            return runtime

        def every_batch():
            size = s.algorithm.batch_size
            for at in range(0, batches.n_rows, size):
                yield collate(batches.examples, range(at, min(at + size, batches.n_rows)))
            if held_out is not None:
                yield held_out

        also = "none" if held_out is None else digest_of(held_out)  # in the same file, whose rows it is to find
        runtime.reference = s.algorithm.provide_reference(live, every_batch, {**key, "held_out": also})
        return runtime

    def _remembered(self, key: Any) -> Remembered | None:
        """What the reference gave before, where its batches come again: not those that are generated anew."""
        if self.settings.algorithm.form == "prompt":
            return None
        return self._once("reference", key, Remembered) if self.keep else Remembered(limit=2**24)

    def prompts(self, limit: int | None) -> list[Prompt] | None:
        """The first prompts of the evaluation split (all, without a limit), or None where there is no such split, or
        where the model is to grade answers and not to write them."""
        if limit == 0 or self.settings.algorithm.form == "graded" or not self.settings.dataset.has_eval():
            return None
        return self.examples("eval", "prompt").prompts[:limit]

    def _accuracy_measure(self) -> Callable[[dict, bool], dict[str, float]] | None:
        evaluation = self.settings.evaluation
        prompts = self.prompts(evaluation.rows)
        reward = self.reward
        if prompts is None or (reward is None and any(prompt.answer is None for prompt in prompts)):
            return None

        def measure(params: dict[str, Any], is_start: bool) -> dict[str, float]:
            def of_these() -> dict[str, float]:
                return evaluate_prompts(self.sampler, params, prompts, evaluation, reward)[0]

            return self._once("first answers", self._answers_key(), of_these) if is_start else of_these()

        return measure

    def _first_look(self, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Held-out metrics of untrained parameters: once for the runs of a sweep that differ in how they go on only."""
        cfg = records.resolved(self.cfg)
        measured = {name: value for name, value in cfg["algorithm"].items() if name not in _UPDATE}
        how = [cfg["trainer"][name] for name in ("eval_rows", "eager")]
        return self._once(f"first look {json.dumps([measured, how])}", self._answers_key(), make)

    def _answers_key(self) -> str:
        """What the answers of untrained parameters depend on: runs of a sweep that have it in common begin alike."""
        names = ("model", "dataset", "evaluation", "sampling", "reward", "hardware", "seed")
        return json.dumps({name: value for name, value in records.resolved(self.cfg).items() if name in names})

    def _sampler(self) -> Callable[[dict, int], list[dict]] | None:
        s = self.settings
        prompts = self.prompts(s.trainer.n_samples) if s.trainer.samples_every else None
        if prompts is None:
            return None
        return lambda params, step: sample_rows(self.sampler, params, prompts, step, s.evaluation.max_new_tokens)


@jax.jit
def _copied(tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(jnp.copy, tree)
