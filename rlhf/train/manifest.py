"""The one file that tells what a checkpoint folder must hold: its record, arrays and files, each with a checksum."""

import dataclasses
import hashlib
import importlib.metadata
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError
from rlhf.train import durable
from rlhf.train.leaves import Entry

FILE = "manifest.json"
ARRAYS = "arrays"  # the folder Orbax writes
_FORMAT = 1
_LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "rlhf")
_N_THREADS = 4  # hashing releases the interpreter lock


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that does not hold what was written; an earlier one may."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was written.

    record: the run's own JSON. entries: the arrays, by name. empty: paths of empty dicts.
    files: bytes and SHA-256 of each file, by its path in the checkpoint folder.
    """

    step: int
    record: dict[str, Any]
    versions: dict[str, str]
    entries: dict[str, Entry]
    empty: list[tuple[str | int, ...]]
    files: dict[str, tuple[int, str]]

    @property
    def full_record(self) -> dict[str, Any]:
        """The run's record with the step and the library versions it was written with."""
        return {"step": self.step, "versions": self.versions, **self.record}


def library_versions() -> dict[str, str]:
    """The releases that wrote a checkpoint."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, indent=1)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record_as_json(record: dict[str, Any], step: int) -> dict[str, Any]:
    """The record as it will be read again (tuples become lists).

    Raises:
        CheckpointError: a value has no JSON form; names the key and the value.
    """
    for key, value in record.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the record of step {step} can't be written as JSON: {key}={value!r}: {error}; nothing was saved"
            ) from error
    return json.loads(json.dumps(record))


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; the last file of a checkpoint."""
    content = {"format": _FORMAT, **dataclasses.asdict(manifest)}
    content = json.loads(json.dumps(content))
    durable.write_text(folder / FILE, _canonical({"content": content, "sha256": _sha256(_canonical(content))}))


def read(folder: Path) -> Manifest:
    """Read and verify the manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, damaged, or of a format of another release.
    """
    path = folder / FILE
    try:
        wrapped = json.loads(path.read_text(encoding="utf-8"))
        content = wrapped["content"]
        is_intact = _sha256(_canonical(content)) == wrapped["sha256"]
    except FileNotFoundError:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: file {FILE} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: file {FILE} can't be read: {error}") from error
    if not is_intact:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: file {FILE} is not what was written (checksum)")
    if content["format"] != _FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {content['format']}; this release reads format {_FORMAT} "
            f"(written with {content['versions']})"
        )
    entries = {
        name: Entry(**{**entry, "path": tuple(entry["path"]), "shape": tuple(entry["shape"])})
        for name, entry in content["entries"].items()
    }
    return Manifest(
        step=content["step"],
        record=content["record"],
        versions=content["versions"],
        entries=entries,
        empty=[tuple(path) for path in content["empty"]],
        files={name: (size, sha256) for name, (size, sha256) in content["files"].items()},
    )


def measure_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of every file below `folder`, by relative path."""
    paths = list(durable.files_under(folder))
    with ThreadPoolExecutor(_N_THREADS) as pool:
        digests = pool.map(durable.sha256, paths)
        return {
            path.relative_to(folder).as_posix(): (path.stat().st_size, digest)
            for path, digest in zip(paths, digests, strict=True)
        }


def check_files(folder: Path, manifest: Manifest, entries: list[Entry]) -> None:
    """Compare the files of these arrays, and those that belong to none, with what was written.

    Raises:
        DamagedCheckpoint: names the folder, the file, the array and what differs.
    """
    owners = {f"{ARRAYS}/{entry.folder}": entry for entry in manifest.entries.values()}
    wanted = {entry.name for entry in entries}

    def check(item: tuple[str, tuple[int, str]]) -> str | None:
        name, (size, sha256) = item
        owner = owners.get(name.rsplit("/", 1)[0])
        if owner is not None and owner.name not in wanted:
            return None
        what = name if owner is None else f"{name} (array {owner.name})"
        path = folder / name
        if not path.is_file():
            return f"file {what} is missing"
        if path.stat().st_size != size:
            return f"file {what} has {path.stat().st_size} bytes, but {size} were written"
        return None if durable.sha256(path) == sha256 else f"file {what} is not what was written (checksum)"

    with ThreadPoolExecutor(_N_THREADS) as pool:
        problems = [problem for problem in pool.map(check, manifest.files.items()) if problem]
    if problems:
        more = f" and {len(problems) - 1} more files differ" if len(problems) > 1 else ""
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {problems[0]}{more}")
