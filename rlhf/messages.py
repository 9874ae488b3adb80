"""Hydra's composition errors in our words: the key, the value, the rule, and the nearest valid name."""

import contextlib
import re
import sys
from pathlib import Path

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from rlhf.errors import nearest


def of_hydra(error: BaseException, words: list[str] | None = None) -> str | None:
    """The message for an error of composition, or None for an error of another kind.

    words: the overrides that were composed; those of the command line if not given.
    """
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, ConfigCompositionException):
        return _unknown_key(error, sys.argv[1:] if words is None else words)
    if isinstance(error, OverrideParseException):
        found = str(error).splitlines()[0].partition(" expecting")[0].strip()
        rule = "a value with signs such as , [ { ( stands in quotes: KEY='\"…\"'"
        if not str(error.override).isascii() or "~" in str(error.override):
            rule = "letters beyond a to z, and ~, stand in quotes, also in a list: KEY=\"['…']\""
        reason = f"{found}; {rule}" if "=" in str(error.override) else "it must be KEY=VALUE"
        return f"the override {error.override!r} can't be read: {reason}"
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return "a group can't be set to null: GROUP=[] chooses none of it, such as reward=[]"
    if isinstance(error, ValueError) and str(error).startswith("Only one of --run"):
        return "-m (a sweep), --cfg, --info and -sc exclude each other: --cfg job shows one run of the sweep"
    cause = error.__cause__ if str(error).startswith("Unable to configure handler") else error
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.filename or 'the file system'}: {cause.strerror} (the command writes to hydra.run.dir=…)"
    if isinstance(error, YAMLError):
        return f"a yaml can't be read: {' '.join(str(error).split())}"
    if isinstance(error, HydraException | SearchPathException | OmegaConfBaseException):
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return None


def _unknown_choice(error: MissingConfigException) -> str:
    text = str(error)
    found = re.search(r"Could not (?:find|load) '([^']+)'", text)
    missing = found.group(1) if found else (error.missing_cfg_file or "")
    group, _, choice = str(missing).rpartition("/")
    options = [str(option) for option in error.options or []] or re.findall(r"^\t(\S+)$", text, re.MULTILINE)
    options = options or _choices(group)  # one of a list: Hydra does not say
    if not group or not options:
        return " ".join(text.split())
    return f"{group}={choice}: there is no such {group}{nearest(choice, options)}"


def _choices(group: str) -> list[str]:
    from rlhf.run import CONF

    return sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml")) if group else []


def _unknown_key(error: ConfigCompositionException, words: list[str]) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    key = re.search(r"(?:full_key: |Could not override ')([\w.]+)", text)
    if key is None:
        return " ".join(text.split())
    name = re.search(r"full_key: ([\w.]+)", text)
    full = name.group(1) if name else key.group(1)
    if "not in struct" not in text:
        return f"{full}: {' '.join(str(error.__cause__ or error).splitlines()[:1])}"
    parent, _, last = full.rpartition(".")
    hint = f" (for one stage of the pipeline: +STAGE.{full}=…)" if any(w.startswith("pipeline=") for w in words) else ""
    cfg = _composed(full, words)
    if inside := [key for key in _keys(cfg) if not parent and key.endswith(f".{last}")]:
        return f"{full}: unknown key; did you mean {' or '.join(inside[:3])}?{hint}"
    node = OmegaConf.select(cfg, parent) if parent else cfg
    siblings = [str(key) for key in node if key != "_target_"] if isinstance(node, DictConfig) else []
    return f"{full}: unknown key{nearest(last, siblings, f'{parent}.' if parent else '')}{hint}"


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    """Full names of all keys."""
    names: list[str] = []
    for name in map(str, node):
        key = f"{prefix}{name}"
        child = node._get_node(name)
        names += [key, *(_keys(child, f"{key}.") if isinstance(child, DictConfig) and not child._is_none() else [])]
    return names


def _composed(unknown: str, words: list[str]) -> DictConfig:
    """The config of the same overrides without the single settings (groups stay); empty where that has none."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from rlhf.run import CONF

    groups = [word for word in words if re.fullmatch(r"[a-z_]+=[\w./,\[\]-]+", word)]
    groups = [word for word in groups if not word.startswith(f"{unknown}=")] + _search_path(words)
    is_inside = GlobalHydra.instance().is_initialized()  # of a run, which goes on with Hydra as it is
    hydra = contextlib.nullcontext() if is_inside else initialize_config_dir(CONF, version_base="1.3")
    try:
        with hydra:
            return compose("config", overrides=groups)
    except (HydraException, OmegaConfBaseException):
        return OmegaConf.create({})


def _search_path(words: list[str]) -> list[str]:
    """The folder of the user's own files, as an override."""
    text = "\n".join(words)
    return [
        f"hydra.searchpath=['file://{Path(folder).absolute()}']"
        for folder in re.findall(r"^(?:--config-dir|-cd)[\n=](.*)$", text, re.MULTILINE)
    ]
