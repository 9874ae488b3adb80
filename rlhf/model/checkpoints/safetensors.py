"""Safetensors: one file, or shards with an index. Slices are read from the mapped file; it is let go of often.

Names differ in what stands in front: `model.`, `language_model.model.`, `model.language_model.`, nothing; the tower
with or without `vision_model.` inside.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints.arrays import Stored, unreadable

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
_KEEP_BYTES = 128 * 2**20  # read before a file is closed: pages of a mapped file count as the process's memory
_FRONT = re.compile(r"^(model\.|language_model\.)+")
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def is_vision(plain: str) -> bool:
    return plain.startswith(("vision_tower.", "multi_modal_projector."))


class SafetensorsArrays:
    """A file, or an index with its shards. See `arrays.Arrays`.

    Raises:
        CheckpointError: a file is missing, cut or no safetensors; an array is named twice.
    """

    world = "hf"

    def __init__(self, path: Path):
        self.path = path
        parts = files(path)
        self.kind = f"safetensors, {len(parts)} file{'s' if len(parts) > 1 else ''}"
        self._found: dict[str, Stored] = {}
        for file in parts:
            for name, shape, dtype in _listed(file):
                plain = _plain(name)
                if plain in self._found:
                    raise CheckpointError(f"{path}: {name} in {file} and {self._found[plain]} are the same array")
                self._found[plain] = Stored(name, file, shape, dtype)
        self._open: tuple[Path | None, Any, int] = (None, None, 0)

    def stored(self, with_vision: bool) -> dict[str, Stored]:
        return {plain: one for plain, one in self._found.items() if with_vision or not is_vision(plain)}

    def rows_at_once(self, stored: Stored) -> int:
        return 1

    def read(self, stored: Stored, start: int, stop: int) -> np.ndarray:
        import safetensors

        file, handle, n_bytes = self._open
        try:
            if file != stored.file or n_bytes > _KEEP_BYTES:
                file, handle, n_bytes = stored.file, safetensors.safe_open(stored.file, framework="numpy"), 0
            array = handle.get_slice(stored.name)[start:stop]
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise unreadable(stored, error) from error
        self._open = (file, handle, n_bytes + array.nbytes)
        return array


def _plain(name: str) -> str:
    return _FRONT.sub("", name).replace("vision_tower.vision_model.", "vision_tower.")


def files(path: Path) -> list[Path]:
    """The file itself, or those that an index names.

    Raises:
        CheckpointError: the index can't be read, or a file it names is missing.
    """
    if path.suffix != ".json":
        return [path]
    index = path
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} can't be read: it should map each array to its file: {error}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {len(names)} files, of which {', '.join(missing[:5])} are not there")
    return [index.parent / name for name in names]


def _listed(file: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of each array. A cut file is found here: its header says where the last array ends."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            if len(first) < 8:
                raise ValueError("it is empty or cut")
            if first == b"version ":
                raise ValueError("it is a pointer of Git LFS; `git lfs pull` fetches the file itself")
            (n_header,) = struct.unpack("<Q", first)
            if n_header > size - 8:
                raise ValueError(f"its header should have {n_header:,} bytes")
            header = json.loads(stream.read(n_header))
        header.pop("__metadata__", None)
        end = max((one["data_offsets"][1] for one in header.values()), default=0)
        listed = [(name, tuple(one["shape"]), _TYPES.get(one["dtype"], one["dtype"])) for name, one in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file} ({size:,} bytes) is no whole safetensors file: {error}") from error
    if 8 + n_header + end > size:
        ends = {name: one["data_offsets"][1] for name, one in header.items()}
        first_cut = min((name for name in ends if 8 + n_header + ends[name] > size), key=lambda name: ends[name])
        raise CheckpointError(
            f"{file} has {size:,} bytes and should have {8 + n_header + end:,}: it is cut, {first_cut} is not whole"
        )
    if 8 + n_header + end < size:
        raise CheckpointError(f"{file} has {size:,} bytes and should have {8 + n_header + end:,}: it is damaged")
    return listed
