"""One checkpoint folder: arrays by Orbax, checked against the manifest. Which folder, and when, is not decided here."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf import processes
from rlhf.errors import CheckpointError
from rlhf.train import durable, leaves, manifest
from rlhf.train.leaves import Entry, Tree
from rlhf.train.manifest import ARRAYS, DamagedCheckpoint, Manifest

_PORTION_BYTES = 128 * 2**20  # of arrays that are read together
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
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_compression=False, multiprocessing_options=_alone(ocp)
        )
        yield ocp, handler, epath.Path(folder / ARRAYS)
    finally:
        absl.setLevel(level)


def _alone(ocp: Any) -> Any:
    """Each of several processes reads, and the first writes, without asking the others."""
    if not processes.is_several():
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )


def _is_spread(array: Any) -> bool:
    return isinstance(array, jax.Array) and len(array.sharding.device_set) > 1


def take_part(tree: Tree) -> None:
    """What every process but the writing one does while that is in `write`: give it the parts that are here."""
    for leaf in leaves.flatten(tree).values():
        leaves.stored_form(leaf)


def write(folder: Path, step: int, tree: Tree, record: dict[str, Any]) -> None:
    """Write a tree and its record into a new folder and put it on the disk; on an error half of it may be there.

    Raises:
        TypeError: a leaf is not an array or a number.
    """
    flat = leaves.flatten(tree)
    stored = {path: leaves.stored_form(leaf) for path, leaf in flat.items()}
    # Shards of an array are gathered here: the store would write them at the same time, which now and then fails, and
    # take an array of one process among several for a mistake. The digest below needs the whole array anyway.
    stored = {path: np.asarray(x) if processes.is_several() or _is_spread(x) else x for path, x in stored.items()}
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


def read(
    folder: Path,
    target: Tree,
    only: str | None = None,
    finish: Callable[[leaves.Path, Any], Any] = lambda path, leaf: leaf,
) -> tuple[Tree, Manifest]:
    """Restore the arrays of `target`; with `only`, those under that key of the checkpoint, whose parts that the target
    does not name are left out.

    Arrays are read, checked and placed some at a time, so that no second copy of them all exists.
    finish: what each becomes in the end, given its path.

    Raises:
        CheckpointError: its arrays are not those of `target`, or the store can't read them.
        DamagedCheckpoint: it does not hold what was written.
    """
    content = manifest.read(folder)
    wanted = leaves.flatten(target)
    parts = {path[:2] for path in wanted}
    entries = {entry.path: entry for entry in content.entries.values() if only is None or entry.path[:2] in parts}
    _compare(folder, entries, wanted)
    manifest.check_files(folder, content, list(entries.values()))
    restored, wrong = {}, []
    for some in _portions([(entries[path], leaf) for path, leaf in wanted.items()]):
        stored = _load(folder, some)
        with ThreadPoolExecutor(_N_THREADS) as pool:
            digests = dict(zip(stored, pool.map(leaves.digest, stored.values()), strict=True))
        wrong += [name for name, digest in digests.items() if digest != content.entries[name].sha256]
        for entry, leaf in some:
            restored[entry.path] = finish(entry.path, leaves.like_target(stored.pop(entry.name), entry, leaf))
    if wrong:
        raise DamagedCheckpoint(
            f"checkpoint {folder} is damaged: array {wrong[0]} is not what was written (checksum)"
            + (f", nor are {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )
    return jax.tree.unflatten(jax.tree.structure(target), [restored[path] for path in wanted]), content


def _portions(wanted: list[tuple[Entry, Any]]) -> Iterator[list[tuple[Entry, Any]]]:
    """Arrays to be read together: of some size, or a single larger one."""
    portion: list[tuple[Entry, Any]] = []
    n_bytes = 0
    for entry, leaf in wanted:
        size = leaves.n_bytes(entry)
        if portion and n_bytes + size > _PORTION_BYTES:
            yield portion
            portion, n_bytes = [], 0
        portion.append((entry, leaf))
        n_bytes += size
    if portion:
        yield portion


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
            reasons = " <- ".join(_chain(error))  # the store's own message names an array, its cause what went wrong
            raise CheckpointError(f"checkpoint {folder} is intact, but its arrays can't be read: {reasons}") from error
    return loaded | {entry.name: arrays[entry.folder] for entry, _ in wanted}


def _chain(error: BaseException | None) -> Iterator[str]:
    """An exception, its cause, the cause of that …, each as its kind and the first line of its message."""
    while error is not None:
        yield f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        error = error.__cause__ or error.__context__
