"""Parameters in the form that Gemma's Kaggle checkpoints have: an Orbax folder, with a slash in its flat names."""

from pathlib import Path
from typing import Any

from rlhf.model.checkpoints.names import slots
from rlhf.model.checkpoints.write_safetensors import file_array
from rlhf.model.gemma3 import Architecture

Tree = dict[str, Any]


def write(tree: Tree, a: Architecture, dtype: str, folder: Path) -> None:
    """Write the flat layout into `folder`, which must not exist; the host holds one copy of the model meanwhile."""
    import orbax.checkpoint as ocp

    flat: dict[str, dict[str, Any]] = {}
    for slot in slots("orbax", a):
        group, _, name = slot.name.rpartition("/")
        first = "SigLiPFromPatches_0/" if group.startswith("vision_encoder/") else "transformer/"
        flat.setdefault(first + group.removeprefix("vision_encoder/"), {})[name] = file_array(tree, slot, a, dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), flat)
