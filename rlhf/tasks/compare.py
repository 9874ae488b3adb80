"""Two checkpoints on the same prompts: accuracy, rewards and win rate, and whether one is better."""

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from rlhf.build import Experiment
from rlhf.config import config
from rlhf.errors import ConfigError
from rlhf.rewards.base import Answered
from rlhf.rewards.weighted import Rewards
from rlhf.sampling.paired import compare_means, pairs_by_prompt, win_rate
from rlhf.tasks.evaluate import RESULT, ROWS, answers_measured

log = logging.getLogger(__name__)

# what makes two accuracies incomparable where it differs
_SETTINGS = ("generation", "passes", "max_new_tokens", "extractor", "template", "system_prompt")


@config
class Compare:
    """`rlhf task=compare task.baseline=OLD model.checkpoint=NEW [reward=…]`.

    baseline: a checkpoint, or the folder of an earlier task=evaluate, whose answers are taken as they are.
    candidate: such a folder, instead of answers of model.checkpoint.

    With a reward, the answers of both are scored together, so that a judge can compare them directly. Writes
    `comparison.json`, and the rows of both in `baseline/` and `candidate/`.
    """

    baseline: str
    candidate: str | None = None

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """
        Raises:
            ConfigError: the folders hold no evaluation. DataError: they answered different prompts.
        """
        reward = experiment.reward
        before = self._side(experiment, self.baseline, "baseline")
        after = self._side(experiment, self.candidate or experiment.settings.model.checkpoint, "candidate")
        pairs = pairs_by_prompt(before[0], after[0])
        result: dict[str, Any] = {}
        for name, key in (("accuracy", "is_correct"), ("format_accuracy", "has_format")):
            if compared := compare_means(pairs, key):
                result[name] = compared
        if reward is not None:
            result |= _by_reward(experiment, reward, pairs)
        if not result:
            raise ConfigError("nothing to compare: the prompts have no answers, and there is no reward=…")
        differing = [name for name in _SETTINGS if before[1].get(name) != after[1].get(name)]
        for name in differing:
            log.warning("%s differs: %r and %r", name, before[1].get(name), after[1].get(name))
        path = experiment.folder / "comparison.json"
        named = {"baseline": self.baseline, "candidate": self.candidate or experiment.settings.model.checkpoint}
        path.write_text(json.dumps({**named, "differing": differing, **result}, indent=1), encoding="utf-8")
        _show(result, path)
        return {f"{name}/{key}": value for name, found in result.items() for key, value in found.items()}

    def _side(
        self, experiment: Experiment, where: str | None, name: str
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows of one side and how they were made: read, or made now."""
        folder = None if where is None else Path(where).expanduser()
        if folder is None or not (folder / ROWS).is_file():
            if folder is not None and (folder / RESULT).is_file():
                raise ConfigError(f"{name}={where}: this evaluation has no {ROWS}: its prompts had no answers")
            other = _with_checkpoint(experiment, where, experiment.folder / name)
            if not answers_measured(other, with_reward=False):
                raise ConfigError("the dataset has no evaluation split with prompts")
            folder = other.folder
        rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines()]
        settings = json.loads((folder / RESULT).read_text(encoding="utf-8")) if (folder / RESULT).is_file() else {}
        return rows, settings


def _with_checkpoint(experiment: Experiment, checkpoint: str | None, folder: Path) -> Experiment:
    """The same experiment with other parameters. The run's own sampler and data are used where they are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg: Any = copy.deepcopy(experiment.cfg)
    with open_dict(cfg):
        cfg.model.checkpoint, cfg.reward = checkpoint, None
    return Experiment(cfg, folder)


def _by_reward(
    experiment: Experiment, reward: Rewards, pairs: Sequence[tuple[list[Mapping], list[Mapping]]]
) -> dict[str, Any]:
    """Means of each reward and of their sum, and win rates, from all answers scored in one call: those of a prompt
    follow each other."""
    prompts = {prompt.row: prompt for prompt in experiment.prompts(None) or []}
    flat = [row for before, after in pairs for one in zip(after, before, strict=True) for row in one]
    scores = reward([_answered(experiment, row, prompts[row["row"]]) for row in flat], 0)
    result: dict[str, Any] = {}
    for name, values in {"reward": scores.total, **{f"rewards/{n}": v for n, v in scores.parts.items()}}.items():
        scored: list[tuple[list[dict], list[dict]]] = []
        place, wins = 0, []
        for before, _ in pairs:
            found: tuple[list[dict], list[dict]] = ([], [])
            for _ in before:
                after_score, before_score = (float(values[place + i]) for i in (0, 1))
                if not scores.is_valid[place] or not scores.is_valid[place + 1]:
                    after_score = before_score = math.nan
                for side, score in zip(found, (before_score, after_score), strict=True):
                    side.append({name: None if math.isnan(score) else score})
                place += 2
            scored.append(found)
            wins.append(_win(found, name))
        result[name] = {**compare_means(scored, name), **win_rate(wins)}
    return result


def _win(found: tuple[list[dict], list[dict]], name: str) -> float:
    """Share of a prompt's answers that are better than the other's of the same number; NaN if one is not known."""
    wins = [
        math.nan if before[name] is None else 0.5 * ((after[name] > before[name]) - (after[name] < before[name]) + 1)
        for before, after in zip(*found, strict=True)
    ]
    return sum(wins) / len(wins)


def _answered(experiment: Experiment, row: Mapping[str, Any], prompt: Any) -> Answered:
    """A stored answer as rewards read it; its tokens are those of its text."""
    ids = experiment.tokenizer.encode(row["completion"])
    ended = ids if row["is_truncated"] else [*ids, experiment.tokenizer.end_of_turn]
    return Answered(
        prompt=row["prompt"],
        completion=row["completion"],
        reference=prompt.answer,
        fields=prompt.fields,
        n_tokens=row["n_tokens"],
        is_truncated=row["is_truncated"],
        row=row["row"],
        prompt_ids=tuple(prompt.token_ids),
        answer_ids=tuple(ended),
    )


def _show(result: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    from tabulate import tabulate

    lines = []
    for name, found in result.items():
        change = f"{found['difference']:+.4f} ({found['difference_low']:+.4f} to {found['difference_high']:+.4f})"
        both = [f"{found['baseline']:.4f}", f"{found['candidate']:.4f}"]
        lines.append([name, found["n"], *both, change, f"{found['p_value']:.4f}", found["verdict"]])
        if "win_rate" in found:
            wins = f"{found['win_rate']:.4f} ({found['win_rate_low']:.4f} to {found['win_rate_high']:.4f})"
            told = [f"{found['win_rate_p_value']:.4f}", found["win_rate_verdict"]]
            lines.append([f"{name}: win rate", found["n"], "", "", wins, *told])
    heads = ["", "n", "baseline", "candidate", "change, 95 % interval", "p", "verdict"]
    log.info("\n\n%s\n\nwritten: %s", tabulate(lines, heads, disable_numparse=True), path)
