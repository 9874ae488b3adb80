"""What the text of `model.checkpoint` names, when it is no path of this machine: a model on Kaggle or on the Hub."""

import dataclasses
import re
from pathlib import Path

from rlhf.errors import ConfigError

FORMS = (
    "a run's folder, an Orbax folder or one that holds it, a .safetensors file, its index or their folder, "
    "a Kaggle handle (google/gemma-3/flax/gemma3-1b-it) or a Hub id (google/gemma-3-1b-it)"
)
_KAGGLE = re.compile(r"([\w.-]+)/([\w.-]+)/(\w+)/([\w.-]+)(?:/(\d+))?")
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_FRAMEWORKS = ("flax", "jax", "transformers")


@dataclasses.dataclass(frozen=True)
class KaggleHandle:
    """owner/model/framework/variation, with a version or the newest."""

    owner: str
    model: str
    framework: str
    variation: str
    version: int | None = None

    def __str__(self) -> str:
        name = f"{self.owner}/{self.model}/{self.framework}/{self.variation}"
        return name if self.version is None else f"{name}/{self.version}"


@dataclasses.dataclass(frozen=True)
class HubHandle:
    """owner/name, with a branch, tag or commit, or the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse(text: str) -> KaggleHandle | HubHandle:
    """The handle in `text`; `kaggle://` and `hf://` in front say which world is meant.

    Raises:
        ConfigError: it is none, or may as well be a path that is missing; the message tells the forms.
    """
    world, _, name = text.rpartition("://")
    if world not in ("", "kaggle", "hf"):
        raise ConfigError(f"model.checkpoint={text}: {world}:// is not known; give {FORMS}")
    kaggle, hub = _KAGGLE.fullmatch(name), _HUB.fullmatch(name)
    if (kaggle is None or world == "hf") and (hub is None or world == "kaggle"):
        raise ConfigError(f"model.checkpoint={text}: no checkpoint in {text}, and it is no handle; give {FORMS}")
    if not world and Path(name.split("/")[0]).is_dir():
        there, prefix = name.split("/")[0], "kaggle" if kaggle else "hf"
        raise ConfigError(
            f"model.checkpoint={text}: the folder {there} is here, but no checkpoint in {text}; if a download is "
            f"meant, write {prefix}://{name}"
        )
    if kaggle is None:
        assert hub is not None
        return HubHandle(hub[1], hub[2])
    owner, model, framework, variation, version = kaggle.groups()
    if framework.lower() not in _FRAMEWORKS:
        raise ConfigError(
            f"model.checkpoint={text}: {framework} is a form of Kaggle that is not read; choose one of "
            f"{', '.join(_FRAMEWORKS)}"
        )
    return KaggleHandle(owner, model, framework, variation, int(version) if version else None)
