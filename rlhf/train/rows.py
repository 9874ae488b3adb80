"""Files of JSON rows in order of their `step`, that go on exactly where a checkpoint left them.

A row is one line, written at once. Floats have the shortest decimal that reads back as the same number, so equal runs
write equal bytes; NaN and the infinities, which JSON lacks, are the strings "NaN", "Infinity" and "-Infinity".
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import CheckpointError
from rlhf.train import durable

log = logging.getLogger(__name__)


class RowFile:
    """Appends rows to a file after cutting those of steps later than `after_step` (0: start anew).

    Raises:
        CheckpointError: a line of the file, other than an unfinished last one, is not a row.
    """

    def __init__(self, path: Path, after_step: int):
        self.path = path
        _cut(path, after_step)
        self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115  # closed by close()
        durable.flush_folder(path.parent)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row and hand it to the operating system: a kill does not lose it, a power cut may until `flush`."""
        self._file.write(json.dumps(_portable(row), allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Put the rows on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            self._file.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file as they are; an unfinished last line is left out.

    Raises:
        CheckpointError: another line is not a row.
    """
    return (row for row, _ in _parse(path))


def as_number(value: Any) -> Any:
    """NaN or an infinity from its name in a file; anything else as it is."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _portable(value: Any) -> Any:
    """The same value in JSON's types."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _portable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(one) for one in value]
    return value


def _parse(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows with the bytes of their lines."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                is_row = isinstance(row, dict) and isinstance(row["step"], int)
            except (ValueError, KeyError):
                is_row = False
            if not is_row and not line.endswith(b"\n"):
                return  # the last line of a killed run
            if not is_row:
                raise CheckpointError(
                    f"{path}, line {number} is not a JSON row with a whole-number step: {line[:80]!r}; the run can't "
                    "tell which rows it has: put the line right, or move the file away"
                )
            yield row, line


def _cut(path: Path, after_step: int) -> None:
    """Shorten a file to its rows of steps up to `after_step`; a single truncation, so a kill leaves it old or new."""
    if not path.exists():
        if after_step > 0:
            log.warning("%s is gone: its rows up to step %d are lost", path, after_step)
        return
    n_bytes, line = 0, b"\n"
    for row, text in _parse(path) if after_step > 0 else ():
        if row["step"] > after_step:
            break
        n_bytes, line = n_bytes + len(text), text
    if n_bytes < path.stat().st_size:
        log.info("%s: rows after step %d are cut; they will be written again", path.name, after_step)
        os.truncate(path, n_bytes)
    if not line.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
    durable.flush_file(path)
