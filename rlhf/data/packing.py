"""Which examples share a row."""

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Put examples into as few rows as best-fit decreasing finds; each row holds at most `capacity` tokens.

    Each example goes into the fullest row that still has room for it, the longest examples first. Deterministic: the
    same lengths give the same rows. Rows are ordered, and inside a row so are the examples, by index.

    lengths: tokens of each example, none more than `capacity`.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fit = bisect.bisect_left(rooms, (lengths[index], -1))
        if fit < len(rooms):
            free, row = rooms.pop(fit)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        bisect.insort(rooms, (free - lengths[index], row))
    return sorted(tuple(sorted(row)) for row in rows)
