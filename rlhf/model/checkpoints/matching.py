"""What a checkpoint holds against what the model needs: everything is compared before anything is read."""

import re
from collections.abc import Iterable

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints.arrays import Arrays, Stored
from rlhf.model.checkpoints.names import KEYS, Slot, sizes, slots
from rlhf.model.checkpoints.safetensors import HEAD
from rlhf.model.gemma3 import Architecture

# Hugging Face's checkpoints with vision have these many embedding rows more than tokens exist; none is ever used.
PADDING_ROWS = 64
_TYPES = ("float32", "bfloat16", "float64", "float16")
_LAYER = re.compile(r"(layer_|layers\.|encoderblock_)(\d+)")


def matched(arrays: Arrays, a: Architecture) -> tuple[list[tuple[Slot, Stored]], Stored | None]:
    """Each array that the model needs with the one that is stored, and a stored output head if there is one.

    Raises:
        CheckpointError: arrays are missing, too many, of another shape or no numbers; names file, arrays and sizes.
    """
    stored = arrays.stored(with_vision=a.vision is not None)
    head = stored.pop(HEAD, None)
    wanted = {slot.name: slot for slot in slots(arrays.world, a)}
    _require_same_model(arrays, wanted, stored, a)
    if missing := [name for name in wanted if name not in stored]:
        raise CheckpointError(f"{arrays.path} lacks {_few(missing)} of the {len(wanted)} arrays that the model needs")
    if extra := [str(one) for name, one in stored.items() if name not in wanted]:
        raise CheckpointError(f"{arrays.path} holds arrays that Gemma 3 has not: {_few(extra)}")
    for name, slot in wanted.items():
        _require_shape(stored[name], slot, a)
    return [(slot, stored[name]) for name, slot in wanted.items()], head


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_same_model(arrays: Arrays, wanted: dict[str, Slot], stored: dict[str, Stored], a: Architecture) -> None:
    """Tell a checkpoint of another size by the settings that differ, not by its first unfitting array."""
    ours, found = sizes(a), dict[str, str]()
    for name in wanted.keys() & stored.keys():
        shape = stored[name].shape
        groups = wanted[name].entry.rule.file
        if len(shape) != len(groups):
            continue
        for group, size in zip(groups, shape, strict=True):
            key = KEYS.get(group[0]) if len(group) == 1 else None
            if key is None or size == ours[group[0]] or (group == ("V",) and _is_padded(size, a.vocab_size)):
                continue
            found.setdefault(key, f"{key}={ours[group[0]]}, but {size} in {stored[name]} {shape}")
    for key, names, n_ours in (
        ("model.layers", [n for n in stored if n.startswith("layer")], a.layers),
        ("model.vision.layers", [n for n in stored if n.startswith("vision")], a.vision.layers if a.vision else 0),
    ):
        n_stored = 1 + max((int(m[2]) for name in names if (m := _LAYER.search(name))), default=-1)
        if n_stored != n_ours and n_stored:
            found[key] = f"{key}={n_ours}, but {n_stored} are stored"
    if found:
        differences = "".join(f"\n  {line}" for _, line in sorted(found.items()))
        raise CheckpointError(
            f"{arrays.path} ({arrays.kind}) is of another model than the one that is set:{differences}"
        )


def _is_padded(n_rows: int, vocab_size: int) -> bool:
    return n_rows == vocab_size + PADDING_ROWS


def _require_shape(stored: Stored, slot: Slot, a: Architecture) -> None:
    expected, shape = slot.entry.rule.file_shape(sizes(a)), stored.shape
    is_padded = slot.entry.leaf[-1] == "embedding" and _is_padded(shape[0], expected[0]) and shape[1:] == expected[1:]
    if shape != expected and not is_padded:
        raise CheckpointError(f"{stored} has shape {shape}; this model needs {expected}")
    if stored.dtype not in _TYPES:
        raise CheckpointError(f"{stored} is of type {stored.dtype}; parameters must be one of {', '.join(_TYPES)}")
