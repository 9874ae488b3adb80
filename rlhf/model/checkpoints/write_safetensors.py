"""Parameters as Hugging Face's safetensors: the names and shapes of `names`, in files of limited size.

A file is a header (8 bytes of length, JSON) and the arrays one behind the other, so it is written array by array.
"""

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.model.checkpoints import safetensors
from rlhf.model.checkpoints.matching import PADDING_ROWS
from rlhf.model.checkpoints.names import Slot, sizes, slots
from rlhf.model.gemma3 import Architecture

Tree = dict[str, Any]

TYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class Part:
    """An array to be written. name: in the file. n_padding: rows behind its own, each a copy of the first."""

    name: str
    slot: Slot
    shape: tuple[int, ...]
    n_padding: int = 0


def write(tree: Tree, a: Architecture, dtype: str, folder: Path, max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` (but at least one array) and their index."""
    item = 4 if dtype == "float32" else 2
    shards: list[list[Part]] = [[]]
    room = max_shard_bytes
    for part in parts(a):
        size = item * int(np.prod(part.shape))
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(part)
        room -= size
    if len(shards) == 1:
        _write_file(folder / safetensors.ONE, shards[0], tree, a, dtype)
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, shard, tree, a, dtype)
        placed |= {part.name: file for part in shard}
    total = item * sum(int(np.prod(part.shape)) for shard in shards for part in shard)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / safetensors.INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def n_rows(a: Architecture) -> int:
    """Rows of the embedding in the file: with vision there are some more, for the id that stands for image tokens."""
    return a.vocab_size if a.vision is None else a.vocab_size + PADDING_ROWS


def parts(a: Architecture) -> Iterator[Part]:
    """Every array with the name that Hugging Face gives it."""
    for slot in slots("hf", a):
        shape, name = slot.entry.rule.file_shape(sizes(a)), slot.name
        if slot.entry.leaf[0] == "model":
            name = f"model.{name}" if a.vision is None else f"language_model.model.{name}"
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if slot.entry.leaf[-1] == "embedding":
            yield Part(name, slot, (n_rows(a), *shape[1:]), n_padding=n_rows(a) - a.vocab_size)
        else:
            yield Part(name, slot, shape)


def _write_file(path: Path, shard: list[Part], tree: Tree, a: Architecture, dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in shard:
        start, end = end, end + int(np.prod(part.shape)) * (4 if dtype == "float32" else 2)
        header[part.name] = {"dtype": TYPES[dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays begin at a multiple of 8
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for part in shard:
            array = file_array(tree, part.slot, a, dtype)
            stream.write(array.view(np.uint8).data)
            if part.n_padding:
                stream.write(np.repeat(array[:1], part.n_padding, axis=0).view(np.uint8).data)


def file_array(tree: Tree, slot: Slot, a: Architecture, dtype: str) -> np.ndarray:
    """One array as the file of the slot's world has it."""
    leaf = tree
    for key in slot.entry.leaf:
        leaf = leaf[key]
    ours = np.asarray(leaf if slot.layer is None else leaf[slot.layer])  # type: ignore[index]
    return slot.entry.rule.to_file(ours, sizes(a)).astype(np.dtype(dtype))
