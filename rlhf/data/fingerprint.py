"""What tells two sets of encoded rows apart: a run goes on only with the rows that it began with."""

import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from rlhf.data.examples import Form, Grade
from rlhf.data.images import Picture


@runtime_checkable
class Row(Protocol):
    """A token row (`rlhf.data.encode.TokenRow`), as far as it counts here."""

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def is_answer(self) -> np.ndarray: ...


def fingerprint_of(
    form: Form,
    rows: Sequence[tuple[Row, ...]],
    packs: list[tuple[int, ...]],
    is_desirable: list[bool],
    grades: list[Grade],
    pictures: list[tuple[Picture, ...]],
) -> str:
    """sha256 over everything that reaches a batch."""
    flat = [row for group in rows for row in group]
    digest = hashlib.sha256(form.encode())
    digest.update(np.array([len(row.tokens) for row in flat], np.int64).tobytes())
    for row in flat:
        digest.update(np.ascontiguousarray(row.tokens).data)
    digest.update(np.packbits(np.concatenate([row.is_answer for row in flat])).tobytes())
    digest.update(np.array([index for group in packs for index in (*group, -1)], np.int64).tobytes())
    digest.update(np.array(is_desirable, bool).tobytes())
    digest.update(np.array(grades, np.float64).tobytes())
    for index, shown in enumerate(pictures):
        digest.update("".join(f"{index} {picture.key}\n" for picture in shown).encode())
    return digest.hexdigest()
