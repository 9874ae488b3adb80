"""Rollouts in a file: one JSON row for each answer, written by `task=rollout`, read by `algorithm.replay`.

| field | |
|---|---|
| `row`, `prompt`, `prompt_ids` | the prompt's row in its dataset, as text, as token ids |
| `text`, `answer_ids`, `finish_reason` | the answer as text and as token ids with its stop token; `stop`, `stop_text` or `length` |
| `logprobs`, `entropies`, `temperature` | of each token of `answer_ids` when it was generated, nats, and at which temperature |
| `reference`, `fields` | the right answer, if any, and the dataset's row |
| `reward`, `rewards`, `is_valid` | the total, each part by name (null where it failed), and whether all could tell; optional |

The rows of a group follow each other.
"""  # noqa: E501

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.algorithms.base import Params, Runtime
from rlhf.algorithms.rollouts import Online, Rollouts, number_or_none, roll_out, score
from rlhf.data.encode import Prompt
from rlhf.errors import DataError
from rlhf.rewards.base import Answered

_NEEDED = ("row", "prompt", "prompt_ids", "text", "answer_ids", "finish_reason", "logprobs", "temperature")


def save_rollouts(path: Path, rollouts: Rollouts, temperature: float) -> None:
    """Append rollouts to a file.

    Raises:
        DataError: a prompt has images, which the file has no place for.
    """
    if any(prompt.pictures for prompt in rollouts.prompts):
        raise DataError(f"{path}: rollouts of prompts with images can't be saved")
    lines = []
    for row, (prompt, answer) in enumerate(zip(rollouts.prompts, rollouts.answers, strict=True)):
        n = int(rollouts.n_tokens[row])
        saved = {
            "row": int(prompt.row),
            "prompt": answer.prompt,
            "prompt_ids": list(map(int, prompt.token_ids)),
            "text": answer.completion,
            "answer_ids": rollouts.tokens[row, :n].tolist(),
            "finish_reason": rollouts.finish_reasons[row],
            "logprobs": rollouts.logprobs[row, :n].tolist(),
            "entropies": rollouts.entropies[row, :n].tolist(),
            "temperature": float(temperature),
            "reference": answer.reference,
            "fields": dict(answer.fields),
            "reward": float(rollouts.rewards[row]),
            "rewards": {name: number_or_none(values[row]) for name, values in rollouts.parts.items()},
            "is_valid": bool(rollouts.is_valid[row]),
        }
        lines.append(json.dumps(saved, default=str))
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(f"{line}\n" for line in lines))


def rolled_out(runtime: Runtime, params: Params, prompts: Sequence[Prompt], algorithm: Online) -> Rollouts:
    """Scored answers: generated, or from the file where one is set."""
    return roll_out(runtime, params, prompts, algorithm) if algorithm.replay is None else replay(runtime, algorithm)


def replay(runtime: Runtime, algorithm: Online) -> Rollouts:
    """The rollouts of batch number `runtime.step` from the file `algorithm.replay`; scored here if the file has no
    rewards.

    Raises:
        DataError: the file is missing, has no rows or one that is not as described above; a batch's rows don't divide
            into groups of one prompt each, or were generated at another temperature.
    """
    assert algorithm.replay is not None
    path, n_rows = Path(algorithm.replay), algorithm.batch_size * algorithm.group_size
    if not path.is_file():
        raise DataError(f"algorithm.replay={path}: there is no such file")
    rows = _read(path, path.stat().st_mtime_ns)
    if len(rows) < n_rows:
        raise DataError(
            f"algorithm.replay={path} has {len(rows)} rollouts, and a batch needs {n_rows} (batch_size "
            f"{algorithm.batch_size} × group_size {algorithm.group_size})"
        )
    start = runtime.step % (len(rows) // n_rows) * n_rows
    chosen = rows[start : start + n_rows]
    _check(path, start, chosen, algorithm)
    return _rollouts(runtime, chosen, algorithm.max_new_tokens)


@functools.lru_cache(maxsize=2)
def _read(path: Path, changed: int) -> list[dict[str, Any]]:
    """changed: when the file was, so that a new one is read."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is no JSON: {error}") from error
        missing = [name for name in _NEEDED if name not in row] if isinstance(row, dict) else list(_NEEDED)
        if missing:
            raise DataError(f"{path}, line {number} is no rollout: it lacks {', '.join(missing)}")
        if not row["answer_ids"] or len(row["answer_ids"]) != len(row["logprobs"]):
            raise DataError(
                f"{path}, line {number}: {len(row['answer_ids'])} answer_ids and {len(row['logprobs'])} logprobs; "
                "there must be as many of each, and at least one"
            )
        rows.append(row)
    return rows


def _check(path: Path, start: int, rows: Sequence[dict[str, Any]], algorithm: Online) -> None:
    wanted, n = float(algorithm.method.temperature), algorithm.group_size
    for place, row in enumerate(rows):
        where = f"{path}, line {start + place + 1}"
        if row["prompt_ids"] != rows[place - place % n]["prompt_ids"]:
            raise DataError(f"{where}: another prompt than its group of algorithm.group_size={n} begins with")
        if abs(row["temperature"] - wanted) > 1e-5:
            raise DataError(
                f"{where} was generated at temperature {row['temperature']:g}, and algorithm.method.temperature is "
                f"{wanted:g}: log-probabilities at different temperatures can't be compared"
            )
        if len(row["answer_ids"]) > algorithm.max_new_tokens:
            raise DataError(
                f"{where}: {len(row['answer_ids'])} tokens, more than "
                f"algorithm.max_new_tokens={algorithm.max_new_tokens}"
            )


def _rollouts(runtime: Runtime, rows: Sequence[dict[str, Any]], max_new_tokens: int) -> Rollouts:
    started = time.perf_counter()
    shape = (len(rows), max_new_tokens)
    tokens, logprobs, entropies = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for place, row in enumerate(rows):
        n = len(row["answer_ids"])
        tokens[place, :n], logprobs[place, :n] = row["answer_ids"], row["logprobs"]
        entropies[place, :n] = row.get("entropies", 0.0)
    answers = [
        Answered(
            prompt=row["prompt"],
            completion=row["text"],
            reference=row.get("reference"),
            fields=row.get("fields", {}),
            n_tokens=len(row["answer_ids"]),
            is_truncated=row["finish_reason"] == "length",
            row=row["row"],
            prompt_ids=tuple(row["prompt_ids"]),
            answer_ids=tuple(row["answer_ids"]),
        )
        for row in rows
    ]
    prompts = [
        Prompt(tuple(row["prompt_ids"]), row.get("reference"), row.get("fields", {}), row["row"]) for row in rows
    ]
    times = {"time/rollout_seconds": time.perf_counter() - started}
    metrics: dict[str, float] = {}
    if all("reward" in row for row in rows):
        rewards = np.array([row["reward"] for row in rows], np.float32)
        names = rows[0].get("rewards", {})
        parts = {name: np.array([row["rewards"].get(name) for row in rows], np.float32) for name in names}
        is_valid = np.array([row.get("is_valid", True) for row in rows])
    else:
        scored = score(runtime, answers)
        rewards, parts, is_valid = scored.total, dict(scored.parts), scored.is_valid
        metrics |= scored.metrics
        times |= {"time/reward_seconds": scored.seconds, **scored.times}
    return Rollouts(
        prompts=prompts,
        answers=answers,
        tokens=tokens,
        logprobs=logprobs,
        entropies=entropies,
        n_tokens=np.array([len(row["answer_ids"]) for row in rows]),
        finish_reasons=[row["finish_reason"] for row in rows],
        rewards=rewards,
        parts=parts,
        is_valid=is_valid,
        metrics=metrics,
        times=times,
    )
