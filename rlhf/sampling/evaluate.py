"""Generated answers to prompts, compared with references and scored by rewards."""

import functools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.config import config, require_range
from rlhf.errors import ConfigError, DataError
from rlhf.model.gemma3 import Tree
from rlhf.rewards.answers import MARKER
from rlhf.rewards.base import Scores
from rlhf.rewards.extract import Extractor, Marked
from rlhf.rewards.weighted import Rewards
from rlhf.sampling.answered import answered
from rlhf.sampling.intervals import interval, interval_of_shares, majority_share, pass_at_k
from rlhf.sampling.methods import Greedy, Method, Sample
from rlhf.sampling.presets import PRESETS, Preset, method_name
from rlhf.sampling.sampler import Completion, Prompt, Sampler, show_prompt

__all__ = ["Evaluation", "evaluate_prompts", "interval", "summarise"]


@config
class Evaluation:
    """How answers are generated and read.

    rows: only the first so many prompts; none takes all, and with 0 a training run evaluates nothing this way.
    passes: answers to each prompt; more than one needs a method that draws.
    max_new_tokens: a longer answer is cut, and counted in `truncated`.
    batch_size: answers that are written at once; the others wait, and enter as these end.
    method: how tokens are chosen: greedy, standard (temperature 0.7, top-k 50, top-p 0.95), liberal (temperature 0.85,
        top-k 2000), or a method.
    seed: of a method that draws.
    stop: texts that end an answer, beside the stop tokens; they are no part of it.
    marker: what stands in front of the final number, in generated answers and in references.
    extractor: how final answers are read and compared; none reads the number behind `marker`.
    """

    rows: int | None = None
    passes: int = 1
    max_new_tokens: int = 256
    batch_size: int = 64
    method: Method | Preset = Greedy()
    seed: int = 0
    stop: tuple[str, ...] = ()
    marker: str = MARKER
    extractor: Extractor | None = None

    def __post_init__(self):
        require_range(self, "rows", at_least=0)
        for name in ("passes", "max_new_tokens", "batch_size"):
            require_range(self, name, at_least=1)
        if not self.marker.strip():
            raise ConfigError("marker of Evaluation must not be blank")
        draws = isinstance(self.drawn_by, Sample) and self.drawn_by.temperature != 0
        if self.passes > 1 and not draws:
            raise ConfigError(
                f"passes={self.passes} of Evaluation needs a method that draws, such as evaluation.method=standard: "
                f"{method_name(self.drawn_by)} answers are the same every time"
            )

    @property
    def drawn_by(self) -> Method:
        """The method, also where it is given by name."""
        return PRESETS[self.method] if isinstance(self.method, str) else self.method

    @property
    def reader(self) -> Extractor:
        """What reads final answers."""
        return Marked(marker=self.marker) if self.extractor is None else self.extractor


def evaluate_prompts(
    sampler: Sampler,
    params: Tree,
    prompts: Sequence[Prompt],
    settings: Evaluation,
    reward: Rewards | None = None,
    is_judged: bool | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer every prompt and compare with its reference. Returns the summary and one row for each answer.

    Summary: `n` prompts; `accuracy` and `format_accuracy`, each with `_low` and `_high` of its 95 % interval;
    `mean_tokens` of the answers, stop token included; `truncated`, the share that was cut. A cut answer is judged like
    any other. With several passes, `pass@k` and `maj@<passes>` with intervals. With a reward, what
    `rlhf.rewards.weighted.Rewards` says of the answers.

    is_judged: whether answers are compared with references; none: unless there is a reward and no prompt has one.

    Raises:
        DataError: no prompts, or one without a reference that can be read; before anything is generated.
    """
    prompts = prompts[: settings.rows]
    if not prompts:
        raise DataError("there is no prompt to evaluate on")
    if is_judged is None:
        is_judged = reward is None or any(prompt.answer is not None for prompt in prompts)
    expected = [_expected(prompt, settings.reader) if is_judged else None for prompt in prompts]
    rollout = sampler(
        params,
        prompts,
        n=settings.passes,
        method=settings.drawn_by,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        stop=settings.stop,
        slots=settings.batch_size,
    )
    rows = []
    for number, completion in enumerate(rollout.completions):
        place = number // settings.passes
        rows.append(_row(sampler, prompts[place], completion, number % settings.passes))
        if (wanted := expected[place]) is not None:
            rows[-1] |= _judged(completion.text, wanted, prompts[place], settings.reader)
    summary = summarise(rows, prompts, settings)
    if reward is not None:
        scores = reward(answered(sampler.tokenizer, prompts, rollout), 0)
        summary |= scores.metrics
        _add_scores(rows, scores)
    return summary, rows


def _add_scores(rows: list[dict[str, Any]], scores: Scores) -> None:
    """Each answer's scores in its row; none where a reward failed on it."""
    for place, row in enumerate(rows):
        for name, values in scores.parts.items():
            row[f"rewards/{name}"] = float(values[place]) if np.isfinite(values[place]) else None
        row["reward"] = float(scores.total[place]) if scores.is_valid[place] else None


def summarise(rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], settings: Evaluation) -> dict[str, float]:
    """The summary of `evaluate_prompts` from its rows, which are in the order of prompts and passes."""
    n_each = settings.passes
    groups = [rows[start : start + n_each] for start in range(0, len(rows), n_each)]
    summary: dict[str, float] = {"n": len(groups)}
    if "is_correct" in rows[0]:
        for name, key in (("accuracy", "is_correct"), ("format_accuracy", "has_format")):
            summary |= _share(name, [statistics.fmean(row[key] for row in group) for group in groups], n_each)
        if n_each > 1:
            summary |= _of_passes(groups, prompts, settings)
    summary["mean_tokens"] = sum(row["n_tokens"] for row in rows) / len(rows)
    summary["truncated"] = sum(row["is_truncated"] for row in rows) / len(rows)
    return summary


def _of_passes(
    groups: Sequence[Sequence[dict[str, Any]]], prompts: Sequence[Prompt], settings: Evaluation
) -> dict[str, float]:
    """`pass@k` for k = 1, 2, 4 … and the number of passes, and `maj@` that number."""
    n = settings.passes
    found: dict[str, float] = {}
    for k in sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n}):
        shares = [pass_at_k(n, sum(row["is_correct"] for row in group), k) for group in groups]
        found |= _share(f"pass@{k}", shares, n if k == 1 else 1)
    votes = [
        majority_share(
            [row["extracted"] for row in group],
            [row["is_correct"] for row in group],
            functools.partial(settings.reader.is_same, fields=prompt.fields),
        )
        for group, prompt in zip(groups, prompts, strict=True)
    ]
    return found | _share(f"maj@{n}", votes, 1)


def _share(name: str, shares: Sequence[float], n_each: int) -> dict[str, float]:
    low, high = interval_of_shares(shares, n_each)
    return {name: statistics.fmean(shares), f"{name}_low": low, f"{name}_high": high}


def _expected(prompt: Prompt, reader: Extractor) -> str:
    if prompt.answer is None:
        raise DataError(f"row {prompt.row} has no reference answer: accuracy needs prompts with an answer")
    try:
        return reader.expected(prompt.answer, prompt.fields)
    except DataError as error:
        raise DataError(f"row {prompt.row}: {error}") from None


def _row(sampler: Sampler, prompt: Prompt, completion: Completion, number: int) -> dict[str, Any]:
    return {
        "row": prompt.row,
        "pass": number,
        "prompt": show_prompt(sampler.tokenizer, prompt),
        "completion": completion.text,
        "n_tokens": completion.n_tokens,
        "is_truncated": completion.is_truncated,
    }


def _judged(text: str, expected: str, prompt: Prompt, reader: Extractor) -> dict[str, Any]:
    extracted = reader.extract(text, prompt.fields)
    return {
        "extracted": extracted,
        "expected": expected,
        "is_correct": extracted is not None and reader.is_same(extracted, expected, prompt.fields),
        "has_format": extracted is not None,
    }
