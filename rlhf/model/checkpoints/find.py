"""What a local path holds: an Orbax directory, safetensors, or a folder with one of them and a tokenizer."""

import dataclasses
import re
from pathlib import Path

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints import hf_config, orbax, safetensors
from rlhf.model.checkpoints.arrays import Arrays
from rlhf.model.checkpoints.handles import FORMS

_OTHERS = {
    ".gguf": "llama.cpp's format",
    ".bin": "PyTorch's pickles",
    ".pt": "PyTorch's pickles",
    ".pth": "PyTorch's pickles",
    ".h5": "Keras's format",
    ".msgpack": "Flax's msgpack",
}
_TOKENIZER = "tokenizer.model"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint on disk. path: Orbax directory, safetensors file or index. The others lie beside it, or are None."""

    path: Path
    config: Path | None
    tokenizer: Path | None

    def open(self) -> Arrays:
        """Its arrays, of which none is read yet.

        Raises:
            CheckpointError: their list can't be read.
        """
        return orbax.OrbaxArrays(self.path) if self.path.is_dir() else safetensors.SafetensorsArrays(self.path)

    def files(self) -> list[Path]:
        """Every file with parameters."""
        if self.path.is_dir():
            return sorted(path for path in self.path.rglob("*") if path.is_file())
        return safetensors.files(self.path)


def find(path: Path) -> Found:
    """The checkpoint that a file or folder is, or holds.

    Raises:
        CheckpointError: it is none, more than one, or of a format that is not read.
    """
    if path.is_file():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            return _found(path, path.parent)
        raise CheckpointError(f"{path} is no checkpoint{_other([path])}; it may be {FORMS}")
    if orbax.is_orbax(path):
        return _found(path, path if (path / _TOKENIZER).is_file() else path.parent)
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} holds a LoRA adapter, not a model: give the base as model.checkpoint=…, and model.adapter={path}"
        )
    inside = [one for one in sorted(path.iterdir()) if one.is_dir() and orbax.is_orbax(one)]
    files = _weights(path)
    candidates = inside + files
    if len(candidates) > 1:
        names = ", ".join(one.name for one in candidates[:3]) + (" …" if len(candidates) > 3 else "")
        if all(_SHARD.search(one.name) for one in candidates):
            raise CheckpointError(f"{path} holds shards ({names}) without their index, {safetensors.INDEX}")
        raise CheckpointError(f"{path} holds several checkpoints: {names}; name one of them")
    if not candidates:
        raise CheckpointError(f"no checkpoint in {path}{_other(sorted(path.iterdir()))}; it may be {FORMS}")
    return _found(candidates[0], path)


def _weights(folder: Path) -> list[Path]:
    """The file or index that transformers would take; otherwise whatever safetensors there are."""
    for name in (safetensors.ONE, safetensors.INDEX):
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors"))
    return sorted(folder.glob("*.safetensors.index.json")) or files


def _found(path: Path, beside: Path) -> Found:
    config, tokenizer = beside / hf_config.FILE, beside / _TOKENIZER
    has_config = config.is_file() and path.is_file()
    return Found(path, config if has_config else None, tokenizer if tokenizer.is_file() else None)


def _other(paths: list[Path]) -> str:
    kinds = {_OTHERS[path.suffix]: path.name for path in paths if path.suffix in _OTHERS}
    return "".join(f": {name} is in {kind}, which is not read" for kind, name in kinds.items())
