"""Orbax directories, read array by array through TensorStore: no template, no second copy, only what is asked for.

Four layouts occur (google-deepmind/gemma 3.3.0, `gm.ckpts`): nested names; flat names with a slash in them, as
released; the layers stacked by their place in the attention pattern; and a trainer's state around one of these, with
the parameters under `params` (for DPO: `params/policy` and `params/anchor`) and the files perhaps under `default/`.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints.arrays import Stored, unreadable

METADATA = "_METADATA"
_STACKED = re.compile(r"stacked_layers/attention_type_(\d+)/(.*)")
_VISION = re.compile(r"vision_encoder/|embedder/mm_")


def is_orbax(folder: Path) -> bool:
    return any((folder / name / METADATA).is_file() for name in (".", "default"))


class OrbaxArrays:
    """An Orbax directory. See `arrays.Arrays`.

    Raises:
        CheckpointError: its list of arrays can't be read, or it holds no Gemma.
    """

    world = "orbax"

    def __init__(self, path: Path):
        self.path = path
        self._folder = path if (path / METADATA).is_file() else path / "default"
        listed = self._listed()
        self._zarr = "zarr3" if listed.get("use_zarr3") else "zarr"
        keys = [tuple(k["key"] for k in one["key_metadata"]) for one in listed["tree_metadata"].values()]
        self._parameters, layout = _parameters(keys, path)
        self._stores: dict[str, Any] = {}
        self.kind = f"Orbax, {layout}"

    def _listed(self) -> dict[str, Any]:
        file = self._folder / METADATA
        try:
            listed = json.loads(file.read_text(encoding="utf-8"))
            return listed if listed["tree_metadata"] else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file} can't be read: it should list the arrays of the checkpoint: {error}"
            ) from error

    def stored(self, with_vision: bool) -> dict[str, Stored]:
        wanted = {plain: key for plain, key in self._parameters.items() if with_vision or not _VISION.match(plain)}
        self._open(sorted(set(wanted.values())))
        n_types = 1 + max((int(m[1]) for plain in wanted if (m := _STACKED.match(plain))), default=-1)
        found: dict[str, Stored] = {}
        for plain, key in wanted.items():
            name = "/".join(key)
            store = self._stores[name]
            shape, dtype = tuple(store.shape), store.dtype.name
            stacked = _STACKED.match(plain)
            if stacked is None:
                found[plain] = Stored(name, self._folder, shape, dtype)
                continue
            for place in range(shape[0]):
                layer = n_types * place + int(stacked[1])
                found[f"layer_{layer}/{stacked[2]}"] = Stored(name, self._folder, shape[1:], dtype, at=place)
        return found

    def _open(self, keys: list[tuple[str, ...]]) -> None:
        import tensorstore

        opening = {}
        for key in keys:
            if "/".join(key) not in self._stores:
                spec = {"driver": self._zarr, "kvstore": self._place(".".join(key)), "fill_missing_data_reads": False}
                opening["/".join(key)] = tensorstore.open(spec, read=True, open=True)
        for name, future in opening.items():
            try:
                self._stores[name] = future.result()
            except (ValueError, OSError) as error:
                raise unreadable(Stored(name, self._folder, (), ""), error) from error

    def _place(self, name: str) -> dict[str, str]:
        if (self._folder / "manifest.ocdbt").is_file():
            return {"driver": "ocdbt", "base": f"file://{self._folder.resolve()}/", "path": f"{name}/"}
        return {"driver": "file", "path": f"{self._folder.resolve()}/{name}/"}

    def rows_at_once(self, stored: Stored) -> int:
        """Rows of a stored chunk, which is unpacked whole."""
        return int(self._stores[stored.name].chunk_layout.read_chunk.shape[stored.at is not None])

    def read(self, stored: Stored, start: int, stop: int) -> np.ndarray:
        store = self._stores[stored.name]
        part = store[start:stop] if stored.at is None else store[stored.at, start:stop]
        try:
            return np.asarray(part.read().result())
        except (ValueError, OSError) as error:
            raise unreadable(stored, error) from error


def _parameters(keys: list[tuple[str, ...]], path: Path) -> tuple[dict[str, tuple[str, ...]], str]:
    """The parameters' keys by plain name, and what the layout is called."""
    layout = "nested"
    chosen = {key: key for key in keys}
    if {"params", "step"} <= {key[0] for key in keys}:
        layout = "state of a trainer"
        chosen = {key: key[1:] for key in keys if key[0] == "params"}
        if {part[0] for part in chosen.values()} == {"policy", "anchor"}:
            layout += ", its policy"
            chosen = {key: part[1:] for key, part in chosen.items() if part[0] == "policy"}
    plain = {_plain("/".join(part)): key for key, part in chosen.items()}
    if any("stacked_layers" in name for name in plain):
        layout = f"{layout}, stacked".removeprefix("nested, ")
    elif any(part[0].startswith("transformer/") for part in chosen.values()):
        layout = f"{layout}, flat".removeprefix("nested, ")
    if "embedder/input_embedding" not in plain:
        few = ", ".join(sorted("/".join(key) for key in keys)[:4])
        raise CheckpointError(f"{path} is an Orbax directory without a Gemma's embedding: it holds {few} …")
    return plain, layout


def _plain(name: str) -> str:
    name = name.removeprefix("transformer/")
    name = re.sub(r"^SigLiPFromPatches_0/", "vision_encoder/", name)
    return name + "/w" if name.endswith(("/gating_einsum", "/linear")) else name
