"""Where rows come from: local json, jsonl and parquet files, and sets on the Hugging Face hub.

Yields raw rows with the place each was found at; what they mean is `rows.py`'s business. jsonl and json are read by
`jsonl.py`, the rest by the `datasets` library, imported when it is needed.
"""

import contextlib
import dataclasses
import difflib
import functools
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.data.jsonl import read_json
from rlhf.errors import DataError

_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz", ".parquet")


@dataclasses.dataclass(frozen=True)
class RawRow:
    """A row as it was found.

    place: file and line, or set, split and row.
    fields: its columns; None if it can't be read, for the reason `problem`.
    folder: of its file, to which paths in it are relative; None: it has none.
    """

    place: str
    fields: dict[str, Any] | None
    problem: str = ""
    folder: Path | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """A picture in a table on the disk. row, column, item (of a list; None: it is no list): where."""

    table: Any
    row: int
    column: str
    item: int | None = None

    def read(self) -> bytes:
        found = self.table[self.row][self.column]
        found = found if self.item is None else found[self.item]
        return Path(found["path"]).read_bytes() if found["bytes"] is None else found["bytes"]


def read_files(files: tuple[Path, ...]) -> Iterator[RawRow]:
    """Every row of the files, in order.

    Raises:
        DataError: a file can't be read as a whole.
    """
    for path in files:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
            continue
        for line, row in read_json(path):
            place = f"{path}:{line}"
            yield RawRow(place, None, str(row)) if isinstance(row, DataError) else RawRow(place, row, "", path.parent)


def find_files(path: str | tuple[str, ...], split: str, key: str = "dataset.path") -> tuple[Path, ...]:
    """The data files meant by `path`: a file, a pattern, a folder with files named after splits, or several of these.

    Raises:
        DataError: nothing there, a kind of file that is not read, or a file that is named twice.
    """
    patterns = (path,) if isinstance(path, str) else path
    if not patterns:
        raise DataError(f"{key} is an empty list")
    found = [file for pattern in patterns for file in _expand(pattern, split, key)]
    doubled = [file for file in found if found.count(file) > 1] if len(patterns) > 1 else []
    if doubled:
        raise DataError(f"{key} names {doubled[0]} twice")
    return tuple(found)


def is_folder(path: str | tuple[str, ...] | None) -> bool:
    """Whether `path` is a folder, whose files are told apart by split."""
    return isinstance(path, str) and Path(path).expanduser().is_dir()


def has_split(folder: str, split: str) -> bool:
    return bool(_files_of_split(Path(folder).expanduser(), split))


def _expand(pattern: str, split: str, key: str) -> list[Path]:
    place = Path(pattern).expanduser()
    if place.is_dir():
        files = _files_of_split(place, split)
        if not files:
            raise DataError(f"{key}={pattern} has no data files of split {split!r}{_other_splits(place, split)}")
        return files
    if place.is_file():
        if not place.name.endswith(_SUFFIXES):
            raise DataError(f"{key}={pattern}: can't read this kind of file; known are {', '.join(_SUFFIXES)}")
        return [place]
    if glob.has_magic(str(place)):
        matches = (Path(match) for match in glob.glob(str(place), recursive=True))
        files = sorted(match for match in matches if match.name.endswith(_SUFFIXES))
        if not files:
            raise DataError(f"{key}={pattern}: no {', '.join(_SUFFIXES)} file matches")
        return files
    raise DataError(f"{key}={pattern}: there is no such file or folder{_near(place)}")


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """`train.jsonl`, `train-00000-of-00002.parquet`, `train/part.jsonl`, or either inside `data/`."""
    name = re.compile(re.escape(split) + r"([-_.].*)?")
    for place in (folder, folder / "data"):
        inside = sorted(place.iterdir()) if place.is_dir() else []
        files = [p for p in inside if p.is_file() and p.name.endswith(_SUFFIXES) and name.fullmatch(_stem(p))]
        if files:
            return files
        if (place / split).is_dir():
            return [p for p in sorted((place / split).iterdir()) if p.is_file() and p.name.endswith(_SUFFIXES)]
    return []


def _stem(path: Path) -> str:
    return next(path.name.removesuffix(suffix) for suffix in _SUFFIXES if path.name.endswith(suffix))


def _other_splits(folder: Path, split: str) -> str:
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir() or p.name.endswith(_SUFFIXES))
    near = difflib.get_close_matches(split, [name.split(".")[0] for name in inside], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f" (there are: {', '.join(inside[:12]) or 'none'}){hint}"


def _near(place: Path) -> str:
    if not place.parent.is_dir():
        return f" (nor the folder {place.parent})"
    near = difflib.get_close_matches(place.name, [p.name for p in place.parent.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import datasets

    try:
        table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # of many classes, those of pyarrow among them; none can be put right here
        reason = error.__cause__ or error
        raise DataError(f"{path} can't be read as parquet: {reason}") from error
    if not len(table):
        raise DataError(f"{path} holds no rows")
    for number, row in enumerate(_without_pixels(table)):
        yield RawRow(f"{path} row {number}", row, "", path.parent)


def read_hub(name: str, subset: str | None, revision: str | None, split: str) -> Iterator[RawRow]:
    """Every row of a split of a set on the Hugging Face hub.

    Raises:
        DataError: no such set, subset or split, no access to it, or no connection.
    """
    import datasets

    with _hub_errors(name, subset, split):
        table = datasets.load_dataset(name, subset, revision=revision, split=split)
    place = name if subset is None else f"{name} ({subset})"
    for number, row in enumerate(_without_pixels(table)):
        yield RawRow(f"{place} {split} row {number}", row)


def _without_pixels(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a table; its pictures stay on the disk, and a `Cell` that finds each stands for it."""
    import datasets

    held = {}
    for column, feature in table.features.items():
        inner = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(inner, datasets.Image) or (isinstance(inner, dict) and inner.keys() == {"bytes", "path"}):
            raw = datasets.Image(decode=False)
            table = table.cast_column(column, datasets.List(raw) if isinstance(feature, datasets.List) else raw)
            held[column] = table.select_columns([column])
    for number, row in enumerate(table):
        for column, alone in held.items():
            if isinstance(row[column], list):
                row[column] = [item and Cell(alone, number, column, place) for place, item in enumerate(row[column])]
            elif row[column] is not None:
                row[column] = Cell(alone, number, column)
        yield row


@functools.cache
def hub_splits(name: str, subset: str | None, revision: str | None) -> tuple[str, ...]:
    """The splits of a set on the hub.

    Raises:
        DataError: no such set or subset, no access to it, or no connection.
    """
    import datasets

    with _hub_errors(name, subset, ""):
        return tuple(datasets.get_dataset_split_names(name, subset, revision=revision))


@contextlib.contextmanager
def _hub_errors(name: str, subset: str | None, split: str) -> Iterator[None]:
    import datasets

    where = f"dataset.hub={name}" if subset is None else f"dataset.hub={name}, dataset.hub_subset={subset}"
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"{where}: no such set, or it is gated and there is no access to it: {error}") from error
    except ValueError as error:  # an unknown split or subset: the message lists those that exist
        raise DataError(f"{where}: {str(error).rstrip('.')}{_nearest(str(error), split, subset)}") from error
    except Exception as error:  # of the classes of three network libraries; none can be put right here
        reason = error.__cause__ or error
        instead = "dataset.path=FOLDER reads local files instead"
        raise DataError(f"{where} can't be read: {type(reason).__name__}: {reason}; {instead}") from error


def _nearest(message: str, *wanted: str | None) -> str:
    choices = [choice for choice in re.findall(r"'([^']+)'", message) if choice not in wanted]
    near = [match for name in wanted if name for match in difflib.get_close_matches(name, choices, n=1, cutoff=0.5)]
    return f"; did you mean {near[0]!r}?" if near else ""
