"""Checkpoints of a run: `checkpoints/step_<n>/` with the arrays (Orbax), a record (JSON) and a checksum of everything.

A folder named `step_<n>` is complete: it was written as `step_<n>.partial`, flushed to the disk, and renamed. An array
has its own SHA-256, taken from memory before it is written and compared after it is read, because the array store does
not notice a flipped bit; each file has one too, so that a damaged file is named before anything is loaded.
Of several processes the first writes: it gathers the arrays, so the files are those of a run in one process, and a run
goes on with any number of processes. All read, so the folder must be on a disk that all of them see.
"""

import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import processes
from rlhf.config import require_range
from rlhf.errors import CheckpointError
from rlhf.train import durable, leaves, manifest, store
from rlhf.train.leaves import Entry, Tree
from rlhf.train.manifest import DamagedCheckpoint, Manifest

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d+)")


class Checkpoints:
    """The checkpoints of one run, of which the newest `max_to_keep` stay.

    Only the process that trains the run may construct one and save with it.
    """

    def __init__(self, folder: Path, max_to_keep: int):
        self.folder = Path(folder)
        self.max_to_keep = max_to_keep
        require_range(self, "max_to_keep", at_least=1)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return _steps(self.folder)

    def save(self, step: int, tree: Tree, record: dict[str, Any]) -> Path:
        """Write a checkpoint and return its folder once it is on the disk; then delete what `max_to_keep` exceeds.

        An existing checkpoint of the same step is replaced.

        Raises:
            CheckpointError: the record has no JSON form (nothing is written), or the disk refuses.
        """
        record = manifest.record_as_json(record, step)
        if not processes.is_first():
            store.take_part(tree)
            return self.path(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        durable.flush_folder(self.folder.parent)
        self._tidy()
        final, partial = self.path(step), self.folder / f"step_{step}.partial"
        try:
            store.write(partial, step, tree, record)
        except Exception as error:  # the array store raises many kinds; all mean that this step is not saved
            with contextlib.suppress(OSError):  # the error that led here is the one to show
                durable.remove_folder(partial)
            if isinstance(error, TypeError):
                raise
            raise CheckpointError(f"checkpoint {final} could not be written: {error}") from error
        if final.exists():
            durable.move(final, final.with_suffix(".old"))
        durable.move(partial, final)
        self._tidy()
        for old in [one for one in self.steps() if one <= step][: -self.max_to_keep]:
            durable.remove_folder(self.path(old))
        return final

    def _tidy(self) -> None:
        """Finish or undo what a kill interrupted: replaced checkpoints and half-written or half-deleted folders."""
        for replaced in self.folder.glob("step_*.old"):
            if replaced.with_suffix("").exists():
                durable.remove_folder(replaced)
            else:
                durable.move(replaced, replaced.with_suffix(""))
        for partial in self.folder.glob("step_*.partial"):
            durable.remove_folder(partial)

    def restore(self, target: Tree, step: int | None = None, allow_older: bool = False) -> tuple[Tree, dict[str, Any]]:
        """The tree of a checkpoint in the structure, kinds and shardings of `target`, bit for bit, and its record.

        target: arrays or `jax.ShapeDtypeStruct`s. An array without sharding goes where JAX puts new arrays.
        step: the newest if not given.
        allow_older: if that one is damaged, use the one before it, and set the damaged one aside as
            `step_<n>.damaged`; otherwise that is an error.

        Raises:
            CheckpointError: there is none; it is damaged (names folder, file, array, and the checkpoint before it);
                or its arrays are not those of `target`.
        """
        steps = [one for one in self.steps() if step is None or one <= step]
        if not steps or (step is not None and steps[-1] != step):
            raise CheckpointError(f"no checkpoint {'' if step is None else f'of step {step} '}in {self.folder}")
        damaged: list[Path] = []
        for candidate, older in zip(reversed(steps), [*reversed(steps[:-1]), None], strict=True):
            try:
                tree, content = store.read(self.path(candidate), target)
            except DamagedCheckpoint as error:
                if older is None:
                    raise CheckpointError(f"{error}; there is no earlier checkpoint in {self.folder}") from error
                if not allow_older:
                    raise CheckpointError(
                        f"{error}; trainer.allow_older_checkpoint=true goes on from the one before, {self.path(older)}"
                    ) from error
                log.warning("%s; trying the one before, %s", error, self.path(older))
                damaged.append(self.path(candidate))
                continue
            for path in damaged:
                self._set_aside(path)
            return tree, content.full_record
        raise AssertionError("a checkpoint without an older one raises")

    def _set_aside(self, path: Path) -> None:
        if not processes.is_first():
            return
        aside = path.with_suffix(".damaged")
        if aside.exists():
            durable.remove_folder(aside)
        durable.move(path, aside)
        log.warning("the damaged checkpoint is kept as %s", aside)

    def record(self, step: int | None = None) -> dict[str, Any]:
        """The record of a checkpoint (the newest if no step is given), without reading its arrays."""
        return read_record(self.folder if step is None else self.path(step))

    def abstract(self, key: str) -> Tree:
        """A target for the part of a checkpoint under `key`, for state whose shape only the run knew.

        Of the newest checkpoint whose manifest can be read: whether an older one may be used is for `restore` to say.

        Raises:
            CheckpointError: there is none, or none has `key`.
        """
        content = self._readable()
        return _part(content, key, {name: leaves.abstract(entry) for name, entry in content.entries.items()})

    def _readable(self) -> Manifest:
        newest = _newest(self.folder)
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedCheckpoint):
                return manifest.read(self.path(step))
        return manifest.read(newest)


def load_parameters(
    path: Path,
    key: str = "params",
    target: Tree = None,
    finish: Callable[[leaves.Path, Any], Any] = lambda path, leaf: leaf,
) -> tuple[Tree, dict[str, Any]]:
    """The parameters in a run's newest checkpoint, or in one checkpoint folder, and its record.

    Only the arrays under `key` are read; their checksums are verified.

    path: a run's folder, its `checkpoints` folder, or one `step_<n>` folder.
    target: where to put them, as in `Checkpoints.restore`; numpy arrays in dicts and lists if not given.
    finish: what each array becomes as soon as it is there, given its path (`key` first).

    Raises:
        CheckpointError: there is no checkpoint, nothing under `key`, damage, or another structure than `target`.
    """
    folder = _newest(Path(path))
    try:
        if target is None:
            content = manifest.read(folder)
            hosted = {name: _on_host(entry) for name, entry in content.entries.items()}
            target = _part(content, key, hosted)
        tree, content = store.read(folder, {key: target}, only=key, finish=finish)
    except DamagedCheckpoint as error:
        older = [step for step in _steps(folder.parent) if f"step_{step}" != folder.name]
        hint = f"; model.checkpoint={folder.parent / f'step_{older[-1]}'} is another of this run" if older else ""
        raise CheckpointError(f"{error}{hint}") from error
    return tree[key], content.full_record


def components(path: Path, key: str = "params") -> list[str]:
    """Names of the parts under `key` in a run's newest checkpoint, or in one checkpoint folder."""
    entries = manifest.read(_newest(Path(path))).entries.values()
    return sorted({str(entry.path[1]) for entry in entries if entry.path[:1] == (key,) and len(entry.path) > 1})


def is_run(path: Path) -> bool:
    """Whether a path is a run with a checkpoint, or one of its checkpoints."""
    if _STEP.fullmatch(path.name) and path.is_dir() and not (path / "_METADATA").exists():  # another library's
        return True
    return any(_steps(folder) for folder in (path, path / "checkpoints"))


def run_folder(path: Path) -> Path:
    """The folder of the run that a checkpoint folder is in; of a run's folder, itself."""
    path = path.parent if _STEP.fullmatch(path.name) else path
    return path.parent if path.name in ("checkpoints", "best") else path


def moved_along(text: str, run: Path) -> str:
    """Where a run started from, as it recorded it; or the folder of that name beside the run, where the recorded path
    is gone: they were moved together."""
    path, beside = Path(text), run_folder(run).parent / Path(text).name
    return str(beside) if path.is_absolute() and not path.exists() and beside.exists() else text


def read_record(path: Path) -> dict[str, Any]:
    """The record of a run's newest checkpoint, or of one checkpoint folder, without reading its arrays."""
    return manifest.read(_newest(Path(path))).full_record


def parameters_digest(path: Path, key: str = "params") -> str:
    """What tells the parameters of a run's newest checkpoint from any others: a hash of their checksums."""
    entries = manifest.read(_newest(Path(path))).entries.values()
    sums = sorted(f"{entry.name} {entry.sha256}" for entry in entries if entry.path[:1] == (key,))
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def import_in_background() -> threading.Thread:
    """Import Orbax while something else runs, so that the first save does not wait for it (0.6 to 2 s)."""

    def load() -> None:
        import orbax.checkpoint  # noqa: F401

    thread = threading.Thread(target=load, name="import orbax")
    thread.start()
    return thread


def _steps(folder: Path) -> list[int]:
    names = (_STEP.fullmatch(path.name) for path in folder.glob("step_*") if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def _newest(path: Path) -> Path:
    """The checkpoint folder that `path` means.

    Raises:
        CheckpointError: there is none.
    """
    if _STEP.fullmatch(path.name) and path.is_dir():
        return path
    for folder in (path, path / "checkpoints"):
        if steps := _steps(folder):
            return folder / f"step_{steps[-1]}"
    raise CheckpointError(f"no checkpoint in {path}: a run's folder or one of its checkpoints/step_<n> is expected")


def _on_host(entry: Entry) -> Any:
    target = leaves.abstract(entry)
    return (
        target if entry.key_impl or entry.kind == "number" else np.broadcast_to(np.zeros((), target.dtype), entry.shape)
    )


def _part(content: Manifest, key: str, values: dict[str, Any]) -> Tree:
    """The values of the arrays under `key`, in dicts and lists."""
    chosen = {entry.path[1:]: values[name] for name, entry in content.entries.items() if entry.path[:1] == (key,)}
    empty = [path[1:] for path in content.empty if path[:1] == (key,)]
    if not chosen and not empty:
        parts = sorted({str(entry.path[0]) for entry in content.entries.values() if entry.path})
        raise CheckpointError(f"the checkpoint of step {content.step} has no {key!r}; it has {', '.join(parts)}")
    return leaves.nest(chosen, empty)
