"""Every yaml of every group: composes, builds what it describes, and has no key that is not explained or not read."""

import ast
import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

import rlhf
from rlhf import sections
from rlhf.run import CONF

CONFIGS = Path(CONF)
PACKAGE = Path(rlhf.__file__).parent
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
DEFINING = ["task", "model", "algorithm", "dataset", "reward", "hardware"]  # the others only set what these define
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]

# a conversation, a preference, an unpaired row or a question
FORMS = {"conversation": "sft", "preference": "dpo", "unpaired": "kto", "graded": "reward_model", "prompt": "sft"}


def composed(*words: str) -> DictConfig:
    """A config of which every value is given."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides=list(words))
    for name in map(str, cfg):
        if OmegaConf.is_missing(cfg, name):
            cfg[name] = "something"
        elif name != "pipeline" and OmegaConf.is_config(cfg[name]):  # a pipeline refers to stages
            for inner in OmegaConf.missing_keys(cfg[name]):
                OmegaConf.update(cfg, inner, "something")
    return cfg


def test_all_groups_are_known():
    assert set(GROUPS) - {"debug", "experiment", "pipeline"} == set(DEFINING)


@pytest.mark.parametrize(("group", "choice"), [file for file in FILES if file[0] != "pipeline"], ids=str)
def test_every_choice_composes_and_builds(group, choice):
    words = [f"{group}={choice}"]
    if group == "dataset":
        rows = OmegaConf.load(CONFIGS / group / f"{choice}.yaml").get("rows", {})
        form = get_class(rows["_target_"]).form if rows else "conversation"
        words.append(f"algorithm={FORMS[form]}")
    if group == "algorithm":
        target = OmegaConf.load(CONFIGS / group / f"{choice}.yaml")["_target_"]
        words += ["reward=gsm8k"] if get_class(target).form == "prompt" else []
    if choice == "judge":
        words.append("reward.judge.checkpoint=something")  # who judges has no default
    settings = sections.settings(composed(*words))
    part = getattr(settings, group, None)
    if group in ("model", "algorithm", "dataset", "reward", "hardware"):
        part = part.parts[choice] if group == "reward" else part
        target = OmegaConf.load(CONFIGS / group / f"{choice}.yaml")["_target_"]
        assert type(part) is get_class(target)


@pytest.mark.parametrize("choice", [choice for group, choice in FILES if group == "task"])
def test_every_task_builds(choice):
    task = sections.task(composed(f"task={choice}"))
    assert callable(task)
    assert dataclasses.is_dataclass(task)


@pytest.mark.parametrize("choice", [choice for group, choice in FILES if group == "pipeline"])
def test_every_stage_of_every_pipeline_builds(choice):
    plan = OmegaConf.to_container(composed(f"pipeline={choice}").pipeline, resolve=False)
    assert set(plan) <= {"stages", "report"}
    for words in plan["stages"].values():
        sections.settings(composed(*(re.sub(r"\$\{stage:(\w+)\}", r"runs/\1", word) for word in words)))


def nodes(tree, prefix: str = "") -> list[tuple[str, dict]]:
    """(place, mapping) of all mappings in a tree that build an object."""
    if not isinstance(tree, dict):
        return []
    inner = [found for name, node in tree.items() for found in nodes(node, f"{prefix}.{name}")]
    return [(prefix, tree)] * ("_target_" in tree) + inner


def test_every_key_is_an_argument_and_every_argument_a_key():
    """So `--cfg job` and the yamls show all there is to set, and nothing that is not."""
    wrong = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        for place, node in nodes(OmegaConf.to_container(OmegaConf.load(path), resolve=False)):
            arguments = {field.name for field in dataclasses.fields(get_class(node["_target_"]))}
            keys = node.keys() - {"_target_", "defaults"}
            if arguments != keys:
                wrong.append(f"{path.name}{place}: {sorted(arguments ^ keys)}")
    assert not wrong, "\n".join(wrong)


def read_attributes() -> set[str]:
    """Names read as `.name` anywhere in the package, apart from the checks that a class makes of itself."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
        skipped = {id(node) for check in checks for node in ast.walk(check)}
        names |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in skipped
        }
    return names


def config_classes() -> list[type]:
    """Every @config class of the package."""
    for module in pkgutil.walk_packages(rlhf.__path__, "rlhf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    classes, waiting = {}, [object]
    while waiting:
        for cls in type.__subclasses__(waiting.pop()):
            if str(cls.__module__).startswith("rlhf.") and cls.__init__.__qualname__.startswith("config."):
                classes[f"{cls.__module__}.{cls.__qualname__}"] = cls
            waiting.append(cls)
    return [cls for _, cls in sorted(classes.items())]


def test_every_setting_is_read():
    read = read_attributes()
    classes = config_classes()
    assert {"SFT", "DPO", "Hardware", "TrainerSettings", "Evaluation", "Sigmoid"} <= {cls.__name__ for cls in classes}
    unread = [f"{cls.__name__}.{field.name}" for cls in classes for field in dataclasses.fields(cls)]
    assert not [name for name in unread if name.partition(".")[2] not in read]


def test_every_section_of_the_config_is_read():
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    whole = (CONFIGS / "config.yaml").read_text(encoding="utf-8")
    for name in composed():
        is_read = re.search(rf'\bcfg\.{name}\b|section\(cfg, "{name}"', text) or f"${{{name}}}" in whole
        assert is_read, f"nothing reads {name} of conf/config.yaml"


def unexplained(text: str) -> list[str]:
    """Lines that give a key its value and have no comment, nor does the line before."""
    lines = text.splitlines()
    return [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\s*[\w.]+:\s*[^\s#]", line)
        and "_target_:" not in line.partition("{")[0]
        and "${" not in line  # the value of a key that is explained where it stands
        and " #" not in line
        and not before.lstrip().startswith("#")
    ]


def test_every_key_has_a_comment():
    wrong = {}
    for path in [CONFIGS / "config.yaml", *(CONFIGS / group / f"{name}.yaml" for group, name in FILES)]:
        text = path.read_text(encoding="utf-8")
        if path.name == "config.yaml":
            text = text.partition("\nhydra:\n")[0]
        elif path.parent.name not in DEFINING:
            text = text.splitlines()[0] if text.startswith("# @") else ""  # sets what is explained where it is defined
        if found := unexplained(text):
            wrong[str(path.relative_to(CONFIGS))] = found
    assert not wrong, wrong


def test_every_file_says_what_it_is_for():
    for group, name in FILES:
        lines = (CONFIGS / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        first = next(line for line in lines if not line.startswith("# @package"))
        assert re.match(r"# \S.{20,}", first), f"{group}/{name}: {first}"
        assert "rlhf" in "".join(lines[:6]) or group in DEFINING, f"{group}/{name} has no command"


def test_comments_are_found_missing():
    assert unexplained("a: 1\nb: 2  # why\n# why\nc: 3\nd:\n  e: 4") == ["a: 1", "  e: 4"]


def test_a_section_that_nothing_reads_is_refused(command, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "typo.yaml").write_text("# @package _global_\ntrianer:\n  max_steps: 3\n")
    done = command("--config-dir", "mine", "experiment=typo")
    assert done.code == 1
    assert "trianer: nothing reads this section; did you mean trainer?" in done.output
    added = command("+optimiser.b1=0.5")
    assert "optimiser: nothing reads this section" in added.output
