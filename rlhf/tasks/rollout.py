"""One batch of rollouts with their rewards, shown best and worst first, kept in a file, and no training."""

import json
import logging
from typing import Any

import numpy as np

from rlhf.algorithms.base import Runtime
from rlhf.algorithms.rollouts import Online, Rollouts, number_or_none, roll_out
from rlhf.algorithms.saved_rollouts import save_rollouts
from rlhf.build import Experiment
from rlhf.config import config, require_range
from rlhf.data.batches import Batches
from rlhf.errors import ConfigError

log = logging.getLogger(__name__)


@config
class Rollout:
    """`rlhf task=rollout algorithm=grpo reward=gsm8k model.checkpoint=…`.

    step: number of the batch, from 0: the prompts, and with the same parameters the answers, of that step of training.
    n_shown: answers in the table, half of them the best. width: characters of each.

    Writes `rollouts.jsonl`, which `algorithm.replay=FILE` takes in place of generating.
    """

    step: int = 0
    n_shown: int = 8
    width: int = 100

    def __post_init__(self):
        require_range(self, "step", at_least=0)
        require_range(self, "n_shown", "width", at_least=1)

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """
        Raises:
            ConfigError: the algorithm does not generate.
        """
        settings = experiment.settings
        algorithm = settings.algorithm
        if not isinstance(algorithm, Online):
            raise ConfigError(
                f"task=rollout needs an algorithm that generates, such as algorithm=grpo; {type(algorithm).__name__} "
                "learns from given answers"
            )
        batches = Batches(experiment.examples("train", "prompt"), algorithm.batch_size, settings.seed)
        runtime = Runtime(
            experiment.model,
            experiment.tokenizer,
            generate=experiment.sampler,
            reward=experiment.reward,
            prompts=batches.examples,
            step=self.step,
        )
        rollouts = roll_out(runtime, experiment.parameters, batches[self.step]["prompts"], algorithm)
        path = experiment.folder / "rollouts.jsonl"
        if any(prompt.pictures for prompt in rollouts.prompts):
            log.warning("prompts with images can't be replayed: %s holds texts and rewards only", path)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in _texts(rollouts))
        else:
            save_rollouts(path, rollouts, float(algorithm.method.temperature))
        result = {**rollouts.metrics, **rollouts.times, "n": len(rollouts)}
        for name, value in result.items():
            log.info("%-28s %.4g", name, value)
        log.info("\n\n%s\n\nwritten: %s", _table(rollouts, self.n_shown, self.width), path)
        return {**result, "path": str(path)}


def _texts(rollouts: Rollouts) -> list[dict[str, Any]]:
    return [
        {
            "row": answer.row,
            "prompt": answer.prompt,
            "text": answer.completion,
            "reference": answer.reference,
            "finish_reason": rollouts.finish_reasons[place],
            "n_tokens": int(rollouts.n_tokens[place]),
            "reward": number_or_none(rollouts.rewards[place] if rollouts.is_valid[place] else np.nan),
            "rewards": {name: number_or_none(values[place]) for name, values in rollouts.parts.items()},
            "is_valid": bool(rollouts.is_valid[place]),
        }
        for place, answer in enumerate(rollouts.answers)
    ]


def _table(rollouts: Rollouts, n_shown: int, width: int) -> str:
    """The best answers from above, then the worst from below; those that could not be judged last."""
    from tabulate import tabulate

    order = np.argsort(-np.where(rollouts.is_valid, rollouts.rewards, -np.inf), kind="stable").tolist()
    judged = [place for place in order if rollouts.is_valid[place]]
    failed = [place for place in order if not rollouts.is_valid[place]]
    n_best = min((n_shown + 1) // 2, len(judged))
    n_worst = min(n_shown // 2, len(judged) - n_best)
    chosen = [*judged[:n_best], *reversed(judged[len(judged) - n_worst :]), *failed[:2]]
    lines = []
    for place in chosen:
        answer = rollouts.answers[place]
        lines.append(
            [
                f"{rollouts.rewards[place]:.4g}" if rollouts.is_valid[place] else "failed",
                *(f"{values[place]:.4g}" for values in rollouts.parts.values()),
                int(rollouts.n_tokens[place]),
                rollouts.finish_reasons[place],
                answer.row,
                _line(answer.completion, width),
                _line(answer.reference or "", width),
            ]
        )
    heads = ["reward", *rollouts.parts, "tokens", "end", "row", "answer", "reference"]
    return tabulate(lines, heads, disable_numparse=True)


def _line(text: str, width: int) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= width else text[: width - 1] + "…"
