"""One checkpoint folder: arrays by Orbax, checked against the manifest. Which folder, and when, is not decided here."""

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf.errors import CheckpointError
from rlhf.train import durable, leaves, manifest
from rlhf.train.leaves import Entry, Tree
from rlhf.train.manifest import ARRAYS, DamagedCheckpoint, Manifest

_N_THREADS = 4  # hashing releases the interpreter lock


@contextlib.contextmanager
def _array_store(folder: Path) -> Iterator[Any]:
    """(Orbax, its handler of trees, the folder of the arrays): one folder an array, uncompressed.

    Compressing 0.67 GB of random weights saved 8 % and took three times as long. `finalize` is never called: it merges
    files of another layout. Orbax's log is silenced: it has a line for every call, and what fails reaches us as errors.
    """
    import orbax.checkpoint as ocp
    from etils import epath  # type: ignore[import-untyped]  # Orbax takes no other kind of path

    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        yield ocp, ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False), epath.Path(folder / ARRAYS)
    finally:
        absl.setLevel(level)


def write(folder: Path, step: int, tree: Tree, record: dict[str, Any]) -> None:
    """Write a tree and its record into a new folder and put it on the disk; on an error half of it may be there.

    Raises:
        TypeError: a leaf is not an array or a number.
    """
    flat = leaves.flatten(tree)
    stored = {path: leaves.stored_form(leaf) for path, leaf in flat.items()}
    arrays = {leaves.folder_of(path): array for path, array in stored.items() if array.size}
    folder.mkdir()
    with ThreadPoolExecutor(_N_THREADS) as pool:
        digests = pool.map(leaves.digest, stored.values())
        if arrays:
            with _array_store(folder) as (ocp, handler, place):
                place.mkdir()
                handler.save(place, args=ocp.args.PyTreeSave(arrays))
        entries = [leaves.describe(path, leaf, sha) for (path, leaf), sha in zip(flat.items(), digests, strict=True)]
    content = Manifest(
        step=step,
        record=record,
        versions=manifest.library_versions(),
        entries={entry.name: entry for entry in entries},
        empty=leaves.empty_dicts(tree),
        files=manifest.measure_files(folder),
    )
    manifest.write(folder, content)
    durable.flush_tree(folder)


def read(folder: Path, target: Tree, only: str | None = None) -> tuple[Tree, Manifest]:
    """Restore the arrays of `target`; with `only`, those under that key of the checkpoint.

    Raises:
        CheckpointError: its arrays are not those of `target`, or the store can't read them.
        DamagedCheckpoint: it does not hold what was written.
    """
    content = manifest.read(folder)
    entries = {entry.path: entry for entry in content.entries.values() if only is None or entry.path[:1] == (only,)}
    wanted = leaves.flatten(target)
    _compare(folder, entries, wanted)
    manifest.check_files(folder, content, list(entries.values()))
    stored = _load(folder, [(entries[path], leaf) for path, leaf in wanted.items()])
    with ThreadPoolExecutor(_N_THREADS) as pool:
        digests = dict(zip(stored, pool.map(leaves.digest, stored.values()), strict=True))
    wrong = [name for name, digest in digests.items() if digest != content.entries[name].sha256]
    if wrong:
        raise DamagedCheckpoint(
            f"checkpoint {folder} is damaged: array {wrong[0]} is not what was written (checksum)"
            + (f", nor are {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )
    restored = [leaves.like_target(stored[leaves.name_of(p)], entries[p], leaf) for p, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), restored), content


def _compare(folder: Path, entries: dict[leaves.Path, Entry], wanted: dict[leaves.Path, Any]) -> None:
    """Refuse a checkpoint whose arrays are not those of the target; names the first that differs."""
    missing = [path for path in wanted if path not in entries]
    extra = [path for path in entries if path not in wanted]
    for paths, text in ((missing, "this run needs and it lacks"), (extra, "it has and this run does not")):
        if paths:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            raise CheckpointError(
                f"checkpoint {folder} is of another model or optimizer: array {leaves.name_of(paths[0])}{more} {text}"
            )
    for path, leaf in wanted.items():
        entry = entries[path]
        found, needed = (entry.shape, entry.dtype), (tuple(np.shape(leaf)), leaves.dtype_name(leaf))
        if found != needed:
            raise CheckpointError(
                f"checkpoint {folder}: array {entry.name} is {found[1]}{list(found[0])}, but this run needs "
                f"{needed[1]}{list(needed[0])}"
            )


def _load(folder: Path, wanted: list[tuple[Entry, Any]]) -> dict[str, Any]:
    """The stored arrays by name: in place where the store can put them there, else in numpy."""
    loaded: dict[str, Any] = {entry.name: leaves.stored_form_of_nothing(entry) for entry, _ in wanted if entry.is_empty}
    wanted = [(entry, target) for entry, target in wanted if not entry.is_empty]
    if not wanted:
        return loaded
    with _array_store(folder) as (ocp, handler, place):
        how = {
            entry.folder: ocp.ArrayRestoreArgs(sharding=leaves.sharding_of(target), global_shape=entry.shape)
            if leaves.is_direct(entry, target)
            else ocp.RestoreArgs(restore_type=np.ndarray)
            for entry, target in wanted
        }
        args = ocp.args.PyTreeRestore(item=dict.fromkeys(how, 0), restore_args=how, partial_restore=True)
        try:
            arrays = handler.restore(place, args=args)
        except Exception as error:  # the array store raises many kinds, and none names the checkpoint
            raise CheckpointError(f"checkpoint {folder} is intact, but its arrays can't be read: {error}") from error
    return loaded | {entry.name: arrays[entry.folder] for entry, _ in wanted}
