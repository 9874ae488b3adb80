"""What a reader offers: the arrays of a checkpoint by their plain names, without reading them."""

import dataclasses
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from rlhf.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array as a file has it.

    name: as the file spells it. file: the file or folder it is in. at: its place on the leading axis of an array that
    holds several layers, None where it is an array of its own; `shape` is without that axis.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    at: int | None = None

    def __str__(self) -> str:
        return f"{self.name}{'' if self.at is None else f'[{self.at}]'} in {self.file}"


@runtime_checkable
class Arrays(Protocol):
    """A checkpoint that is open.

    path: what the user named. world: the table of names, `orbax` or `hf`. kind: what it is, in words.
    """

    path: Path
    world: str
    kind: str

    def stored(self, with_vision: bool) -> dict[str, Stored]:
        """The arrays by plain name; those of the vision tower only if asked for."""
        ...

    def rows_at_once(self, stored: Stored) -> int:
        """The smallest number of rows whose reading costs no more memory and time than it must."""
        ...

    def read(self, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Rows of the first axis, in the file's type.

        Raises:
            CheckpointError: the file is cut or damaged; names file and array.
        """
        ...


def unreadable(stored: Stored, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{stored} can't be read, the file is cut or damaged: {reason[:300]}")
