"""How an array of a file lies in one of our leaves: a rule such as `(H h) D -> D H h`, read in either direction.

Letters are sizes of the architecture. Brackets are axes that the file has as one. A number on the right is a place on
an axis of ours that the file has in several arrays: `(K h) D -> D 0 K h` are the keys in keys-and-values.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

Sizes = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Rule:
    """text: the rule. file: groups of letters, one group an axis of the file. ours: letters and places."""

    text: str
    file: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    @property
    def letters(self) -> tuple[str, ...]:
        """The file's axes, with brackets opened, without those of size 1 that we have not."""
        return tuple(letter for group in self.file for letter in group if letter in self.ours)

    @property
    def places(self) -> dict[int, int]:
        """The number on each axis of ours that has one."""
        return {axis: int(letter) for axis, letter in enumerate(self.ours) if letter.isdigit()}

    @property
    def order(self) -> tuple[int, ...]:
        """For each axis of ours without a number, the opened axis of the file."""
        return tuple(self.letters.index(letter) for letter in self.ours if not letter.isdigit())

    def file_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.file)

    def opened_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in self.letters)

    def to_ours(self, opened: Any) -> Any:
        """The array in our order of axes, those with a number of size 1. opened: of `opened_shape`."""
        arranged = opened.transpose(self.order)
        shape = list(arranged.shape)
        for axis in self.places:  # ascending
            shape.insert(axis, 1)
        return arranged.reshape(shape)

    def to_file(self, ours: np.ndarray, sizes: Sizes) -> np.ndarray:
        """The part of one of our leaves (without its layer axis) that an array of the file holds."""
        index = tuple(self.places.get(axis, slice(None)) for axis in range(ours.ndim))
        back = np.argsort(self.order)
        return np.ascontiguousarray(ours[index].transpose(back)).reshape(self.file_shape(sizes))


@functools.cache
def rule(text: str) -> Rule:
    left, right = text.split(" -> ")
    groups = re.findall(r"\([^)]*\)|\S+", left)
    return Rule(text, tuple(tuple(group.strip("()").split()) for group in groups), tuple(right.split()))
