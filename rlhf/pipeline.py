"""Pipelines: named stages, each a normal run in a folder of its own; a later stage starts from an earlier one.

A stage is a list of overrides. `${stage:sft}` in one stands for the folder of stage `sft`. What the user sets on the
command line (`seed=…`, `trainer.max_steps=…`, `debug=fast`) holds for every stage and takes the place of what the
stage sets, references to other stages apart. `+sft.trainer.max_steps=…` is for stage `sft` alone, and the last word.
"""

import difflib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from rlhf import processes
from rlhf.errors import ConfigError, FolderInUse, UserError, nearest
from rlhf.overrides import with_whole_values
from rlhf.report.write import try_write_report

log = logging.getLogger(__name__)

_DONE = "stage.json"  # written when a stage is finished: its result and the overrides it ran with


def run(cfg: DictConfig, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the stages in order, skipping those that are finished when `resume` is given; print the table of results.

    Raises:
        ConfigError: a stage can't be composed, told before the first one runs; or the folder holds other stages.
    """
    plan: Any = OmegaConf.to_container(cfg.pipeline, resolve=False)  # ${stage:…} is ours to fill in
    stages = _stages(plan)
    if cfg.resume not in (None, "auto") and not any((folder / name).is_dir() for name in stages):
        raise ConfigError(f"resume={cfg.resume}: this folder has none of the stages {', '.join(stages)}")
    given = [word for word in overrides if not re.match(r"[+~]*(pipeline|resume|hydra|name)\b", word)]
    _require_stages(given, stages)
    alone = {name: [w.partition(".")[2] for w in given if re.match(rf"\++{name}\.", w)] for name in stages}
    given = [word for word in given if not re.match(rf"\++({'|'.join(stages)})\.", word)]
    configs: dict[str, tuple[DictConfig, list[str]]] = {}
    asked: dict[str, list[str]] = {}  # without folders, so that a pipeline can be moved
    for name, words in stages.items():  # all are composed before the first runs: a typo in the last fails now
        asked[name] = [*_combined(name, words, given), *alone[name]]
        configs[name] = _compose(name, _located(name, asked[name], folder, configs))
    results = {}
    for number, (name, (stage_cfg, words)) in enumerate(configs.items(), 1):
        label = f"{number}/{len(stages)} {name}"
        results[name] = _stage(label, stage_cfg, words, asked[name], folder / name, cfg.resume is not None)
    _report(results, plan.get("report"), folder)
    return {f"{name}/{key}": value for name, result in results.items() for key, value in result.items()}


def _stages(plan: dict[str, Any]) -> dict[str, list[str]]:
    """The overrides of each stage, from the section `pipeline`."""
    for key in plan:
        if key not in ("stages", "report"):
            raise ConfigError(f"pipeline.{key}: a pipeline has no such key{nearest(key, ('stages', 'report'))}")
    stages = plan.get("stages")
    if not stages or not isinstance(stages, dict):
        raise ConfigError(f"pipeline.stages={stages!r} must name each stage with a list of overrides")
    for name, words in stages.items():
        if not isinstance(words, list) or not all(isinstance(word, str) and "=" in word for word in words):
            raise ConfigError(
                f"pipeline.stages.{name}={words!r} must be a list of overrides, as [algorithm=dpo,seed=1]"
            )
        for word in words:
            if _key(word) in ("resume", "pipeline") or _key(word).startswith("hydra."):
                raise ConfigError(
                    f"pipeline.stages.{name}: {word} is of the whole pipeline; a stage's folder has its name, and goes "
                    "on when the pipeline does"
                )
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ConfigError(f"pipeline.stages.{name}: the name of a stage is a word, since it names a folder")
    return stages


def _require_stages(given: list[str], stages: dict[str, list[str]]) -> None:
    """Refuse `+STAGE.…` with the name of a stage misspelt."""
    for word in given:
        found = re.match(r"\++(\w+)\.", word)
        if found and found[1] not in stages and difflib.get_close_matches(found[1], stages):
            raise ConfigError(f"{word}: the pipeline has no stage {found[1]!r}{nearest(found[1], stages)}")


def _combined(stage: str, words: list[str], given: list[str]) -> list[str]:
    """The overrides of a stage and the user's; where both set a key, the user's, unless the stage refers to another.

    Raises:
        ConfigError: the user chooses another file of a group (such as algorithm=…) than the stage does.
    """
    own = {_key(word): word for word in words}
    for word in given:
        key = _key(word)
        if own.get(key, word) != word and GlobalHydra.instance().config_loader().get_group_options(key):
            raise ConfigError(
                f"{word}: pipeline stage {stage} is made for {own[key]}; +{stage}.{word} changes that stage alone"
            )
    is_fixed = {key for key, word in own.items() if "${stage:" in word}
    taken = {_key(word) for word in given} | _keys_of_debug(given)
    return [word for key, word in own.items() if key not in taken - is_fixed] + [
        word for word in given if _key(word) not in is_fixed
    ]


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _keys_of_debug(given: list[str]) -> set[str]:
    """The keys that a chosen debug=… sets."""
    choice = next((word.partition("=")[2] for word in given if _key(word) == "debug"), "null")
    loader: Any = GlobalHydra.instance().config_loader()
    stored = loader.repository.load_config(f"debug/{choice}")
    return set() if stored is None else set(_flat(OmegaConf.to_container(stored.config, resolve=False)))


def _flat(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix]
    return [key for name, node in tree.items() for key in _flat(node, f"{prefix}.{name}".lstrip("."))]


def _located(stage: str, words: list[str], folder: Path, earlier: dict[str, Any]) -> list[str]:
    """The overrides with folders in place of `${stage:…}`."""

    def place(found: re.Match) -> str:
        name = found.group(1)
        if name not in earlier:
            rule = f"the stages before it are: {', '.join(earlier) or 'none'}"
            raise ConfigError(f"pipeline stage {stage} refers to {found.group(0)}, but {rule}")
        path = f"{folder / name}{found.group(2)}"
        if re.fullmatch(r"[\w./+-]*", path, re.ASCII):
            return path
        quoted = path.replace("'", "\\'")  # as Hydra wants other letters in an override
        return f"'{quoted}'"

    return [re.sub(r"\$\{stage:([^}]*)\}([\w./-]*)", place, word) for word in words]


def _compose(name: str, words: list[str]) -> tuple[DictConfig, list[str]]:
    from rlhf import messages, sections

    try:
        cfg = compose(HydraConfig.get().job.config_name, overrides=with_whole_values(words))
    except Exception as error:
        message = messages.of_hydra(error, words)
        if message is None:
            raise
        raise ConfigError(f"pipeline stage {name}: {message} (for one stage alone: +STAGE.KEY=…)") from error
    if name in cfg:
        raise ConfigError(f"pipeline.stages.{name}: a stage can't have the name of a section of the config")
    with open_dict(cfg):
        cfg.name = cfg.name or name
    try:
        sections.settings(cfg)
    except ConfigError as error:
        raise ConfigError(f"pipeline stage {name}: {error}") from error
    return cfg, words


def _stage(
    label: str, cfg: DictConfig, words: list[str], asked: list[str], folder: Path, resume: bool
) -> dict[str, Any]:
    """Run a stage with the overrides `words`; asked: the same with other stages by their names."""
    from rlhf import tasks

    done = folder / _DONE
    if done.is_file():
        stored = json.loads(done.read_text())
        if not resume:
            raise FolderInUse(f"{folder} holds a finished stage; resume=auto skips it, or choose another folder")
        if stored["overrides"] not in (asked, words):
            raise FolderInUse(
                f"{folder} was made with {stored['overrides']}, now it would be {asked}; choose another folder"
            )
        log.info("stage %s: finished before, skipped", label)
        return stored["result"]
    log.info("stage %s: %s", label, " ".join(words))
    if processes.is_first():
        _store(folder / ".hydra", cfg, words)
    if resume:
        cfg.resume = "auto"
    handler: logging.Handler = logging.NullHandler()
    if processes.is_first():
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.getLogger().addHandler(handler)
    try:
        result = tasks.run(cfg, folder, overrides=words)
    except SystemExit:
        log.warning("the pipeline stopped in stage %s; go on with resume=%s", label, folder.parent)
        raise
    except Exception as error:  # the terminal gets it from whoever ends the run, the stage's own log from here
        trace = None if isinstance(error, UserError) else sys.exc_info()
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (error,), trace))
        log.error("the pipeline failed in stage %s; mended, it goes on with resume=%s", label, folder.parent)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        try_write_report(folder)
    if processes.is_first():
        done.write_text(json.dumps({"overrides": asked, "result": result}))
    return result


def _store(folder: Path, cfg: DictConfig, words: list[str]) -> None:
    """What Hydra stores of a run, so that a stage can be repeated alone."""
    from rlhf.run import make_repeatable

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(words), encoding="utf-8")
    make_repeatable(folder)


def _report(results: dict[str, dict[str, Any]], measured: list[str] | None, folder: Path) -> None:
    """Held-out metrics before and after each stage, and where each wrote; all metrics if none are named."""
    from tabulate import tabulate

    if measured is None:
        names = [name for result in results.values() for name in result if name.startswith("before/")]
        names = [name for name in names if name != "before/n" and not name.endswith(("_low", "_high"))]
        measured = list(dict.fromkeys(name.removeprefix("before/") for name in names))
    rows = []
    for stage, result in results.items():
        cells = [f"{_number(result.get(f'before/{n}'))} → {_number(result.get(f'after/{n}'))}" for n in measured]
        rows.append([stage, *cells, str(folder / stage)])
    log.info("\n\n%s\n", tabulate(rows, ["stage", *measured, "folder"], disable_numparse=True))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
