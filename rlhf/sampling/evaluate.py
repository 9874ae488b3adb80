"""Accuracy of generated answers on prompts that have a reference answer."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rlhf.config import config, require_range
from rlhf.errors import ConfigError, DataError
from rlhf.model.gemma3 import Tree
from rlhf.model.tokenizer import Tokenizer
from rlhf.rewards.answers import MARKER, final_answer, is_same_number, reference_answer
from rlhf.rewards.base import Answered, Reward
from rlhf.sampling.methods import Greedy, Method
from rlhf.sampling.sampler import Completion, Prompt, Sampler, show_prompt

_Z = 1.959964  # two-sided 95 % of the normal distribution


@config
class Evaluation:
    """How answers are generated and read.

    rows: only the first so many prompts; none takes all, and with 0 a training run evaluates nothing this way.
    max_new_tokens: a longer answer is cut, and counted in `truncated`.
    batch_size: answers that are written at once; the others wait, and enter as these end.
    method: how tokens are chosen.
    seed: of a method that draws.
    stop: texts that end an answer, beside the stop tokens; they are no part of it.
    marker: what stands in front of the final number, in generated answers and in references.
    """

    rows: int | None = None
    max_new_tokens: int = 256
    batch_size: int = 64
    method: Method = Greedy()
    seed: int = 0
    stop: tuple[str, ...] = ()
    marker: str = MARKER

    def __post_init__(self):
        require_range(self, "rows", at_least=0)
        for name in ("max_new_tokens", "batch_size"):
            require_range(self, name, at_least=1)
        if not self.marker.strip():
            raise ConfigError("marker of Evaluation must not be blank")


def interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927): where the true share may lie; (0, 1) when nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, _Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return 0.0 if successes == 0 else low, 1.0 if successes == n else high  # the formula's own ends, without rounding


def evaluate_prompts(
    sampler: Sampler,
    params: Tree,
    prompts: Sequence[Prompt],
    settings: Evaluation,
    reward: Reward | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer every prompt and compare with its reference. Returns the summary and one row for each prompt.

    Summary: `n`; `accuracy` and `format_accuracy`, each with `_low` and `_high` of its 95 % interval; `mean_tokens` of
    the answers, stop token included; `truncated`, the share that was cut. A cut answer is judged like any other. With a
    reward, `rewards/<name>/mean` and `/std` over the answers.

    Raises:
        DataError: no prompts, or one without a number as reference; before anything is generated.
    """
    prompts = prompts[: settings.rows]
    if not prompts:
        raise DataError("there is no prompt to evaluate on")
    expected = [_expected(prompt, settings.marker) for prompt in prompts]
    completions = sampler(
        params,
        prompts,
        method=settings.method,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        stop=settings.stop,
        slots=settings.batch_size,
    ).completions
    judged = zip(prompts, completions, expected, strict=True)
    rows = [_judge(sampler.tokenizer, *each, marker=settings.marker) for each in judged]
    return summarise(rows) | (_score(rows, prompts, reward) if reward is not None else {}), rows


def _score(rows: list[dict[str, Any]], prompts: Sequence[Prompt], reward: Reward) -> dict[str, float]:
    """Add each answer's reward to its row; mean and standard deviation for the summary.

    Raises:
        DataError: the reward gave another number of scores than there are answers, or one that is not finite.
    """
    answers = [
        Answered(r["prompt"], r["completion"], p.answer, p.fields, r["n_tokens"], r["is_truncated"])
        for r, p in zip(rows, prompts, strict=True)
    ]
    scores = [float(score) for score in reward(answers, 0)]
    if len(scores) != len(rows):
        raise DataError(f"reward {reward.name} gave {len(scores)} scores for {len(rows)} answers")
    for row, score in zip(rows, scores, strict=True):
        if not math.isfinite(score):
            raise DataError(f"reward {reward.name} gave {score} for row {row['row']}: {row['completion']!r:.200}")
        row[f"rewards/{reward.name}"] = score
    name = f"rewards/{reward.name}"
    return {f"{name}/mean": statistics.fmean(scores), f"{name}/std": statistics.pstdev(scores)}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The summary of `evaluate_prompts` from its rows."""
    n = len(rows)
    summary: dict[str, float] = {"n": n}
    for name, key in (("accuracy", "is_correct"), ("format_accuracy", "has_format")):
        successes = sum(row[key] for row in rows)
        low, high = interval(successes, n)
        summary |= {name: successes / n, f"{name}_low": low, f"{name}_high": high}
    summary["mean_tokens"] = sum(row["n_tokens"] for row in rows) / n
    summary["truncated"] = sum(row["is_truncated"] for row in rows) / n
    return summary


def _expected(prompt: Prompt, marker: str) -> str:
    if prompt.answer is None:
        raise DataError(f"row {prompt.row} has no reference answer: accuracy needs prompts with an answer")
    try:
        return reference_answer(prompt.answer, marker)
    except DataError as error:
        raise DataError(f"row {prompt.row}: {error}") from None


def _judge(
    tokenizer: Tokenizer, prompt: Prompt, completion: Completion, expected: str, *, marker: str
) -> dict[str, Any]:
    extracted = final_answer(completion.text, marker)
    return {
        "row": prompt.row,
        "prompt": show_prompt(tokenizer, prompt),
        "completion": completion.text,
        "extracted": extracted,
        "expected": expected,
        "is_correct": extracted is not None and is_same_number(extracted, expected),
        "has_format": extracted is not None,
        "n_tokens": completion.n_tokens,
        "is_truncated": completion.is_truncated,
    }
