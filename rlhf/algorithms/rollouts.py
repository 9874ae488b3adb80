"""Prompts to scored answers, for every algorithm that learns from its own: generate, judge, one batch of fixed shape.

An online algorithm is a subclass of `Online`: `roll_out` gives its `prepare` the answers with their rewards, `as_batch`
makes arrays of them, `policy_logprobs` and `reference_logprobs` score them. All log-probabilities are those of
softmax(logits / temperature) over the whole vocabulary, at the rollout's temperature: top-k, top-p and min-p narrow
what is drawn, not what is trained. `rlhf.algorithms.saved_rollouts` keeps answers in a file and reads them back.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int

from rlhf.algorithms.base import Algorithm, Batch, Params, Runtime
from rlhf.algorithms.reference import LiveReference
from rlhf.config import config, require_range
from rlhf.data.encode import Prompt
from rlhf.data.images import load_images
from rlhf.errors import ConfigError
from rlhf.model.sharding import place_rows
from rlhf.rewards.base import Answered, Scores
from rlhf.sampling.generate import shape_for
from rlhf.sampling.methods import Sample
from rlhf.sampling.sampler import show_prompt

ROUND_TO = 8  # the time axis is a multiple of this
ATTEMPTS_APART = 2**24  # steps between the noise of a step's rollouts: no run is so long


@config
class Online(Algorithm):
    """What algorithms that generate have besides `Algorithm`; `batch_size` counts prompts.

    group_size: answers to each prompt. The other counts (minibatches, microbatch_size) are of answers.
    max_new_tokens: a longer answer is cut, and has no stop token.
    method: how tokens are drawn; its temperature is that of every log-probability.
    stop: texts that end an answer, beside the stop tokens.
    replay: a file of saved rollouts to take in place of generating, in order, from the start again at its end.
    """

    form = "prompt"

    group_size: int = 8
    max_new_tokens: int = 256
    method: Sample = Sample()
    stop: tuple[str, ...] = ()
    replay: str | None = None

    def __post_init__(self):
        require_range(self, "group_size", at_least=1)
        require_range(self, "max_new_tokens", at_least=1)
        temperature = self.method.temperature
        if isinstance(temperature, float | int) and temperature == 0:
            raise ConfigError(
                "algorithm.method.temperature=0 is greedy: all answers to a prompt are the same, and no probability is "
                "trained; it must be above 0"
            )
        super().__post_init__()

    @property
    def rows_per_batch(self):
        return self.batch_size * self.group_size

    @property
    def needs_reward(self):
        return True

    @property
    def trains_entropy(self) -> bool:
        """Whether the loss takes entropies beside the log-probabilities."""
        return False


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Answers with their scores; a row is one answer, and a group's rows follow each other.

    prompts: of each row. answers: what the reward sees of each row.
    tokens: the stop token included; 0 after an answer's end, as all arrays [rows, time] are.
    logprobs, entropies: of generation, at its temperature, nats.
    finish_reasons: `stop`, `stop_text` or `length` (cut).
    rewards: the total; 0 where it is not valid. parts: of each reward by name, NaN where it failed. is_valid: whether
        every reward has judged the answer; one that is not must count nowhere.
    metrics: of the sampler and the reward. times: seconds by name (`time/rollout_seconds`, `time/reward_seconds`).
    """

    prompts: list[Prompt]
    answers: list[Answered]
    tokens: Int[np.ndarray, "rows time"]
    logprobs: Float[np.ndarray, "rows time"]
    entropies: Float[np.ndarray, "rows time"]
    n_tokens: Int[np.ndarray, "rows"]
    finish_reasons: list[str]
    rewards: Float[np.ndarray, "rows"]
    parts: dict[str, Float[np.ndarray, "rows"]]
    is_valid: Bool[np.ndarray, "rows"]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    times: dict[str, float] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def is_truncated(self) -> Bool[np.ndarray, "rows"]:
        """Whether each answer was cut before its end."""
        return np.array([reason == "length" for reason in self.finish_reasons])

    def take(self, rows: Sequence[int] | Int[np.ndarray, "some"]) -> "Rollouts":
        """Some of the rows, in the order given; metrics and times stay those of the whole."""
        rows = [int(row) for row in rows]
        changed: dict[str, Any] = {}
        for name in ("prompts", "answers", "finish_reasons"):
            changed[name] = [getattr(self, name)[row] for row in rows]
        for name in ("tokens", "logprobs", "entropies", "n_tokens", "rewards", "is_valid"):
            changed[name] = getattr(self, name)[rows]
        return dataclasses.replace(self, **changed, parts={name: x[rows] for name, x in self.parts.items()})


def join(some: Sequence[Rollouts]) -> Rollouts:
    """Rollouts one behind the other; times and counts of errors are added up, other metrics are the mean over rows."""
    if len(some) == 1:
        return some[0]
    joined: dict[str, Any] = {}
    for name in ("prompts", "answers", "finish_reasons"):
        joined[name] = [one for part in some for one in getattr(part, name)]
    for name in ("tokens", "logprobs", "entropies", "n_tokens", "rewards", "is_valid"):
        joined[name] = np.concatenate([getattr(part, name) for part in some])
    n_rows = sum(map(len, some))
    metrics: dict[str, float] = {}
    times: dict[str, float] = {}
    for part in some:
        for name, value in part.metrics.items():
            share = 1.0 if name.endswith("/errors") else len(part) / n_rows
            metrics[name] = metrics.get(name, 0.0) + share * value
        for name, value in part.times.items():
            times[name] = times.get(name, 0.0) + value
    parts = {name: np.concatenate([part.parts[name] for part in some]) for name in some[0].parts}
    return Rollouts(**joined, parts=parts, metrics=metrics, times=times)


def roll_out(
    runtime: Runtime, params: Params, prompts: Sequence[Prompt], algorithm: Online, attempt: int = 0
) -> Rollouts:
    """`algorithm.group_size` scored answers to each prompt.

    attempt: the number of this rollout in its step; each has noise of its own.
    """
    n = algorithm.group_size
    generate: Any = runtime.generate
    slots = generate.settings.slots
    longest = max(longest_prompt(runtime), max(len(prompt.token_ids) for prompt in prompts))
    rollout = generate(
        params,
        prompts,
        n=n,
        method=algorithm.method,
        max_new_tokens=algorithm.max_new_tokens,
        step=runtime.step + ATTEMPTS_APART * attempt,
        stop=algorithm.stop,
        wants_entropy=True,
        shape=None if generate.shapes else shape_for(algorithm.batch_size, n, longest, algorithm.max_new_tokens, slots),
    )
    shown = [show_prompt(runtime.tokenizer, prompt) for prompt in prompts]
    generation, told = rollout.generation, rollout.metrics()
    answers = [
        Answered(
            prompt=shown[row // n],
            completion=done.text,
            reference=prompt.answer,
            fields=prompt.fields,
            n_tokens=done.n_tokens,
            is_truncated=done.is_truncated,
            row=prompt.row,
            prompt_ids=tuple(prompt.token_ids),
            answer_ids=tuple(generation.tokens[row, : done.n_tokens].tolist()),
        )
        for row, done in enumerate(rollout.completions)
        for prompt in (prompts[row // n],)
    ]
    scored = score(runtime, answers)
    return Rollouts(
        prompts=[prompt for prompt in prompts for _ in range(n)],
        answers=answers,
        tokens=generation.tokens,
        logprobs=generation.logprobs,
        entropies=generation.entropies,
        n_tokens=generation.n_tokens,
        finish_reasons=generation.finish_reasons,
        rewards=scored.total,
        parts=dict(scored.parts),
        is_valid=scored.is_valid,
        metrics={"sampling/utilisation": told["sampling/utilisation"], **scored.metrics},
        times={
            "time/rollout_seconds": told["sampling/seconds"],
            "time/reward_seconds": scored.seconds,
            **scored.times,
        },
    )


def score(runtime: Runtime, answers: Sequence[Answered]) -> Scores:
    """What the run's rewards say of the answers."""
    reward: Any = runtime.reward
    return reward(answers, runtime.step)


def longest_prompt(runtime: Runtime) -> int:
    """Tokens of the longest prompt of the training rows: shapes are made for it, so that each is compiled once."""
    return max(len(prompt.token_ids) for prompt in runtime.prompts.prompts)


def rounded(n_tokens: int) -> int:
    """The time axis of rows that have so many."""
    return -(-n_tokens // ROUND_TO) * ROUND_TO


def as_batch(runtime: Runtime, rollouts: Rollouts, max_new_tokens: int) -> Batch:
    """Prompts with their answers as the trainer's arrays, which have one shape for the whole run.

    The keys that conversations have (`rlhf.data.batches`: `tokens`, `segments`, `positions`, `is_answer`, `row`; with
    images `soft_tokens` and `images`), and of generation, 0 outside the answer:

    | key | type | shape | |
    |---|---|---|---|
    | `scored` | int32 | [rows, max_new_tokens] | places of the answer's tokens, which alone are scored; 0 fills up |
    | `sampler_logprobs` | float32 | [rows, time] | log-probability of each answer token as it was generated |
    | `sampler_entropy` | float32 | [rows, time] | entropy of the distribution it was drawn from, before filters |
    """
    longest = max(longest_prompt(runtime), max(len(prompt.token_ids) for prompt in rollouts.prompts))
    shape = (len(rollouts), rounded(longest + max_new_tokens))
    batch: Batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "positions")}
    batch |= {name: np.zeros(shape, np.float32) for name in ("sampler_logprobs", "sampler_entropy")}
    batch["scored"] = np.zeros((len(rollouts), max_new_tokens), np.int32)
    batch |= {"is_answer": np.zeros(shape, bool), "row": np.array([p.row for p in rollouts.prompts], np.int32)}
    batch["tokens"][:] = runtime.prompts.pad
    for row, (prompt, n) in enumerate(zip(rollouts.prompts, rollouts.n_tokens, strict=True)):
        start = len(prompt.token_ids)
        end = start + n
        batch["tokens"][row, :start] = prompt.token_ids
        batch["tokens"][row, start:end] = rollouts.tokens[row, :n]
        batch["segments"][row, :end] = 1
        batch["positions"][row, :end] = np.arange(end)
        batch["is_answer"][row, start:end] = True
        batch["scored"][row, :n] = np.arange(start, end)
        batch["sampler_logprobs"][row, start:end] = rollouts.logprobs[row, :n]
        batch["sampler_entropy"][row, start:end] = rollouts.entropies[row, :n]
    if runtime.prompts.n_slots:
        batch |= _images(runtime, rollouts, shape)
    return batch


def _images(runtime: Runtime, rollouts: Rollouts, shape: tuple[int, int]) -> Batch:
    soft_tokens = np.zeros(shape, np.int32)
    for row, prompt in enumerate(rollouts.prompts):
        soft_tokens[row, : len(prompt.soft_tokens)] = prompt.soft_tokens
    size = runtime.model.architecture.tower.image_size
    images = load_images([prompt.pictures for prompt in rollouts.prompts], runtime.prompts.n_slots, size)
    return {"soft_tokens": soft_tokens, "images": images}


def policy_logprobs(
    runtime: Runtime, params: Params, batch: Batch, algorithm: Online
) -> Float[np.ndarray, "*rows time"]:
    """What the trainer's own function says of the policy that has these parameters, a microbatch at a time.

    The log-probabilities that the sampler reports differ from these in their rounding (and by more, where it generates
    with narrower weights), so a ratio to the sampler's would not be 1 before the first update.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
    place = functools.partial(place_rows, mesh=mesh)
    rows, with_entropy = algorithm.rows_at_once(batch), algorithm.trains_entropy
    scorer = LiveReference(runtime.model, params, rows, place, with_entropy=with_entropy)
    return np.asarray(scorer.token_logprobs(batch, algorithm.method.temperature))


def reference_logprobs(runtime: Runtime, batch: Batch, algorithm: Online) -> Float[np.ndarray, "*rows time"]:
    """The reference's log-probabilities at the rollout's temperature; notes `time/reference_seconds`."""
    started, reference = time.perf_counter(), runtime.reference
    if (rows := algorithm.rows_at_once(batch)) != algorithm.microbatch_size:
        reference = reference.with_rows(rows)
    logprobs = np.asarray(reference.token_logprobs(batch, algorithm.method.temperature))
    runtime.log.times["time/reference_seconds"] = time.perf_counter() - started
    return logprobs


def number_or_none(value: Any) -> float | None:
    """None for what JSON has no number for: a reward that failed."""
    return float(value) if np.isfinite(value) else None


def log_rollouts(runtime: Runtime, rollouts: Rollouts, advantages: Float[np.ndarray, "rows"]) -> None:
    """Tell `runtime.log` of a batch's answers: metrics (docs/metrics.md), times, and rows for `samples.jsonl`.

    advantages: one for each answer, for the rows that are shown.
    """
    lengths, is_valid = rollouts.n_tokens, rollouts.is_valid
    runtime.log.metrics |= rollouts.metrics | {
        "reward/invalid": float(1 - is_valid.mean()),
        "sampling/mean_tokens": float(lengths.mean()),
        "sampling/max_tokens": float(lengths.max()),
        "sampling/min_tokens": float(lengths.min()),
        "sampling/truncated": float(rollouts.is_truncated.mean()),
        "policy/entropy": float(rollouts.entropies.sum() / lengths.sum()),
    }
    named = {f"rewards/{name}": values for name, values in rollouts.parts.items()}
    for name, values in {"reward": np.where(is_valid, rollouts.rewards, np.nan), **named}.items():
        known = values[np.isfinite(values)]  # those of the batch, which may not be all that were scored
        if known.size:
            runtime.log.metrics |= {f"{name}/mean": float(known.mean()), f"{name}/std": float(known.std())}
    runtime.log.times |= rollouts.times
    runtime.log.rollouts = _shown(rollouts, advantages)


def _shown(rollouts: Rollouts, advantages: Float[np.ndarray, "rows"]) -> list[dict[str, Any]]:
    """One row for each answer: the best, the worst, the second best …; those that could not be judged, without a
    reward, last."""
    order = [row for row in np.argsort(-rollouts.rewards, kind="stable").tolist() if rollouts.is_valid[row]]
    alternating = [order[place // 2] if place % 2 == 0 else order[-1 - place // 2] for place in range(len(order))]
    alternating += np.flatnonzero(~rollouts.is_valid).tolist()
    return [
        {
            "row": rollouts.prompts[row].row,
            "prompt": rollouts.answers[row].prompt,
            "text": rollouts.answers[row].completion,
            "reference": rollouts.answers[row].reference,
            "reward": number_or_none(rollouts.rewards[row] if rollouts.is_valid[row] else np.nan),
            "rewards": {name: number_or_none(values[row]) for name, values in rollouts.parts.items()},
            "advantage": float(advantages[row]),
            "n_tokens": int(rollouts.n_tokens[row]),
            "finish_reason": rollouts.finish_reasons[row],
        }
        for row in alternating
    ]
