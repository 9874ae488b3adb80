"""From a composed config to its sections, each checked by its own class, then what they ask of each other.

Nothing is loaded here, so a mistake costs no time.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.algorithms.base import Algorithm
from rlhf.data.dataset import Data
from rlhf.errors import ConfigError, nearest
from rlhf.model.settings import ModelSettings
from rlhf.rewards.base import Reward
from rlhf.rewards.weighted import Rewards
from rlhf.sampling.evaluate import Evaluation
from rlhf.sampling.settings import SamplingSettings
from rlhf.train.hardware import Hardware
from rlhf.train.settings import TrainerSettings


def section(cfg: DictConfig, key: str, kind: type | None = None) -> Any:
    """Build the object that a section of the config describes.

    Raises:
        ConfigError: a key is unknown, missing or has a value that its class refuses; the message has its full name.
    """
    missing = [str(name) for name in cfg if OmegaConf.is_missing(cfg, name)]  # sections may refer to them
    node = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(node):
        raise ConfigError(f"{key}={node!r} must be a section, with the settings of its yaml")
    for name in missing or sorted(OmegaConf.missing_keys(node)):  # full names already
        raise ConfigError(f"{name} has no value yet: give one as {name}=…")
    try:
        built = instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise ConfigError(_reason(error, key, node)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
    if kind is not None and not isinstance(built, kind):
        raise ConfigError(f"{key}: _target_ must name a {kind.__name__}, not {node.get('_target_')!r}")
    return built


def _reason(error: InstantiationException, key: str, node: DictConfig) -> str:
    found = re.search(r"full_key: (\S+)", str(error))
    full = found.group(1) if found else key
    if not full.startswith(key):
        full = f"{key}.{full}" if full else key
    cause = error.__cause__
    text = str(cause) if isinstance(cause, ConfigError) else " ".join(str(error).split())
    if missing := re.match(r"Error locating target '([\w.]+)'", text):
        return f"{full}._target_={missing[1]}: {_not_there(missing[1])}"
    if "is no setting of" in text and full != key:  # left of the object that was there before, perhaps
        target = OmegaConf.select(node, f"{full.removeprefix(key + '.')}._target_")
        text += f" (an object in the place of another is given whole: '{full}={{_target_: {target}, …}}')"
    return text if text.startswith(key) else f"{full}.{text}" if isinstance(cause, ConfigError) else f"{full}: {text}"


def _not_there(target: str) -> str:
    """Why there is no such class."""
    place, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(place)
    except (ImportError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == place and key[0] != "_"]
    return f"{place} has no {name}{nearest(name, own)}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every section of a config, built and checked."""

    model: ModelSettings
    algorithm: Algorithm
    dataset: Data
    reward: Rewards | None
    hardware: Hardware
    trainer: TrainerSettings
    evaluation: Evaluation
    sampling: SamplingSettings
    seed: int

    def __post_init__(self):
        self.dataset.check(self.algorithm.form)
        if self.algorithm.needs_reward and self.reward is None:
            raise ConfigError(f"algorithm={type(self.algorithm).__name__} generates and scores: choose a reward=…")
        shards, rows = self.hardware.n_row_shards, self.algorithm.microbatch_size
        if rows % shards:
            raise ConfigError(
                f"algorithm.microbatch_size={rows} must be a multiple of the {shards} parts that hardware.mesh splits "
                f"rows into (data × fsdp); try {max(rows // shards, 1) * shards}"
            )


def settings(cfg: DictConfig) -> Settings:
    """All sections of `cfg`; loads nothing."""
    _require_read(cfg)
    if not isinstance(cfg.seed, int) or isinstance(cfg.seed, bool) or not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed={cfg.seed!r} must be an integer from 0 to 2^32 - 1")
    return Settings(
        model=section(cfg, "model", ModelSettings),
        algorithm=section(cfg, "algorithm", Algorithm),
        dataset=section(cfg, "dataset", Data),
        reward=_rewards(cfg),
        hardware=section(cfg, "hardware", Hardware),
        trainer=section(cfg, "trainer", TrainerSettings),
        evaluation=section(cfg, "evaluation", Evaluation),
        sampling=section(cfg, "sampling", SamplingSettings),
        seed=cfg.seed,
    )


def _rewards(cfg: DictConfig) -> Rewards | None:
    """The rewards chosen, by name: each yaml of the group puts its reward under a key of its own."""
    if not cfg.reward:
        return None
    if "_target_" not in cfg.reward:
        return Rewards({str(name): section(cfg, f"reward.{name}", Reward) for name in cfg.reward})
    if any(OmegaConf.is_dict(node) for node in cfg.reward.values()):
        raise ConfigError(
            f"reward: the yaml of {cfg.reward._target_} must begin with `# @package reward.<its name>`, so that it can "
            "stand in a list beside others"
        )
    only = section(cfg, "reward", Reward)
    return Rewards({type(only).__name__.lower(): only})


def _require_read(cfg: DictConfig) -> None:
    """Refuse a section that nothing reads: a name misspelt in a yaml, where Hydra does not notice, or after a `+`."""
    names = {field.name for field in dataclasses.fields(Settings)} | {"task", "pipeline", "name", "resume"}
    text = OmegaConf.to_yaml(cfg)
    for name in map(str, cfg):
        if name not in names and not re.search(rf"\$\{{{name}[.}}]", text):
            raise ConfigError(f"{name}: nothing reads this section{nearest(name, names)}")


def task(cfg: DictConfig) -> Callable[[Any], dict[str, Any]]:
    """What to do with the rest: a function of the run's parts (`rlhf.build.Experiment`)."""
    return section(cfg, "task")
