"""Pipelines: named stages, each a normal run in a folder of its own; a later stage starts from an earlier one.

A stage is a list of overrides. `${stage:sft}` in one stands for the folder of stage `sft`. Overrides that the user gave
on the command line hold for every stage (`model=…`, `seed=…`); `pipeline.extra.<stage>=[…]` for one.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from rlhf.errors import ConfigError, nearest

log = logging.getLogger(__name__)

_DONE = "stage.json"  # written when a stage is finished: its result and the overrides it ran with


def run(cfg: DictConfig, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the stages in order, skipping those that are finished when `resume` is given; print the table of results."""
    plan: Any = OmegaConf.to_container(cfg.pipeline, resolve=False)  # ${stage:…} is ours to fill in
    stages = {str(name): [str(word) for word in words] for name, words in plan["stages"].items()}
    extra = {str(name): [str(word) for word in words] for name, words in plan["extra"].items()}
    for name in extra:
        if name not in stages:
            raise ConfigError(f"pipeline.extra.{name}: the pipeline has no such stage{nearest(name, stages)}")
    common = [o for o in overrides if not re.match(r"[+~]*(pipeline|resume|hydra|name)\b", o)]
    configs: dict[str, tuple[DictConfig, list[str]]] = {}
    for name, words in stages.items():  # all are composed before the first runs: a typo in the last fails now
        configs[name] = _compose(name, [*common, *_located(name, words + extra.get(name, []), folder, configs)])
    results = {}
    for number, (name, (stage_cfg, words)) in enumerate(configs.items(), 1):
        results[name] = _stage(
            f"{number}/{len(stages)} {name}", stage_cfg, words, folder / name, cfg.resume is not None
        )
    _report(results, plan["report"], folder)
    return {f"{name}/{key}": value for name, result in results.items() for key, value in result.items()}


def _located(stage: str, words: list[str], folder: Path, earlier: dict[str, Any]) -> list[str]:
    def place(found: re.Match) -> str:
        name = found.group(1)
        if name not in earlier:
            rule = f"the stages before it are: {', '.join(earlier) or 'none'}"
            raise ConfigError(f"pipeline stage {stage} refers to {found.group(0)}, but {rule}")
        return str(folder / name)

    return [re.sub(r"\$\{stage:(\w+)\}", place, word) for word in words]


def _compose(name: str, words: list[str]) -> tuple[DictConfig, list[str]]:
    from rlhf import messages

    try:
        cfg = compose("config", overrides=words)
    except Exception as error:
        raise ConfigError(f"pipeline stage {name}: {messages.of_hydra(error) or error}") from error
    with open_dict(cfg):
        cfg.name = cfg.name or name
    return cfg, words


def _stage(label: str, cfg: DictConfig, words: list[str], folder: Path, resume: bool) -> dict[str, Any]:
    from rlhf import tasks

    done = folder / _DONE
    if done.is_file():
        stored = json.loads(done.read_text())
        if not resume:
            raise ConfigError(f"{folder} holds a finished stage; resume=auto skips it, or choose another folder")
        if stored["overrides"] != words:
            raise ConfigError(
                f"{folder} was made with {stored['overrides']}, now it would be {words}; choose another folder"
            )
        log.info("stage %s: finished before, skipped", label)
        return stored["result"]
    log.info("stage %s: %s", label, " ".join(words))
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(words), encoding="utf-8")
    if resume:
        cfg.resume = "auto"
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.getLogger().addHandler(handler)
    try:
        result = tasks.run(cfg, folder, overrides=words)
    except Exception:
        log.exception("stage %s failed", label)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    done.write_text(json.dumps({"overrides": words, "result": result}))
    return result


def _report(results: dict[str, dict[str, Any]], measured: list[str], folder: Path) -> None:
    """Held-out metrics before and after each stage, and where each wrote."""
    from tabulate import tabulate

    rows = []
    for stage, result in results.items():
        cells = [f"{_number(result.get(f'before/{n}'))} → {_number(result.get(f'after/{n}'))}" for n in measured]
        rows.append([stage, *cells, str(folder / stage)])
    log.info("\n\n%s\n", tabulate(rows, ["stage", *measured, "folder"], disable_numparse=True))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
