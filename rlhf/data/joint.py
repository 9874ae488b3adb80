"""Sequences that begin alike (a pair; the answers to a prompt) in one row: the beginning, then the rest of each. The
beginning is run once.

| key | of | |
|---|---|---|
| `joint_tokens`, `joint_segments`, `joint_positions` | [rows, joint] | as in `batches.py`; segments: 1 the beginning, 2 … the rests (of a pair: 2 chosen, 3 rejected) |
| `joint_prefixes` | [rows, joint] | the segment that a token sees besides its own: 1 for the rests |
| `joint_previous` | [rows, joint] | place of the token before it, from whose hidden state it is predicted; -1: none |
| `joint_soft_tokens` | [rows, joint] | where the batch has images: as in `batches.py` |
| `joint_places` | [rows, sequences, time] | where in the row each token of a sequence is; -1: padding |
"""  # noqa: E501

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

WORTH = 0.7  # of the separate rows' tokens: attention over one long row costs more than over two short ones

SoftTokens = Sequence[int] | Int32[np.ndarray, "_"] | None
Pair = tuple[Int32[np.ndarray, "_"], Int32[np.ndarray, "_"]]  # chosen, rejected


def n_shared(pair: Pair) -> int:
    """Tokens that both sequences begin with."""
    shorter = min(map(len, pair))
    differs = np.flatnonzero(pair[0][:shorter] != pair[1][:shorter])
    return int(differs[0]) if len(differs) else shorter


def joint_length(pair: Pair) -> int:
    """Tokens of the row that holds both."""
    return len(pair[0]) + len(pair[1]) - n_shared(pair)


def join(
    pairs: Sequence[Pair],
    n_joint: int,
    n_time: int,
    batch_size: int,
    pad: int,
    soft_tokens: Sequence[SoftTokens] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays above for a batch of pairs; rows past the given ones are empty.

    soft_tokens: of each pair's chosen sequence, in a batch with images; they are part of what both begin with.
    """
    shared = [n_shared(pair) for pair in pairs]
    beginnings = [pair[0][:n] for pair, n in zip(pairs, shared, strict=True)]
    rests = [[side[n:] for side in pair] for pair, n in zip(pairs, shared, strict=True)]
    return join_continuations(beginnings, rests, 2, n_joint, n_time, batch_size, pad, soft_tokens)


def join_continuations(
    beginnings: Sequence[Sequence[int] | Int32[np.ndarray, "_"]],
    rests: Sequence[Sequence[Int32[np.ndarray, "_"]]],
    n_rests: int,
    n_joint: int,
    n_time: int,
    batch_size: int,
    pad: int,
    soft_tokens: Sequence[SoftTokens] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays above for beginnings with `n_rests` continuations each; rows past the given ones are empty."""
    names = ("segments", "positions", "prefixes", "soft_tokens")[: 3 if soft_tokens is None else 4]
    batch = {f"joint_{name}": np.zeros((batch_size, n_joint), np.int32) for name in names}
    batch["joint_tokens"] = np.full((batch_size, n_joint), pad, np.int32)
    batch["joint_previous"] = np.full((batch_size, n_joint), -1, np.int32)
    batch["joint_places"] = np.full((batch_size, n_rests, n_time), -1, np.int32)
    for row, (beginning, others) in enumerate(zip(beginnings, rests, strict=True)):
        shared = at = len(beginning)
        if soft_tokens is not None and (numbers := soft_tokens[row]) is not None:
            batch["joint_soft_tokens"][row, : min(shared, len(numbers))] = numbers[:shared]
        _write(batch, row, 1, beginning, at=0, first=0)
        batch["joint_places"][row, :, :shared] = np.arange(shared)
        for side, tokens in enumerate(others):
            _write(batch, row, 2 + side, tokens, at=at, first=shared)
            batch["joint_places"][row, side, shared : shared + len(tokens)] = np.arange(at, at + len(tokens))
            at += len(tokens)
    return batch


def _write(
    batch: dict[str, np.ndarray], row: int, segment: int, tokens: Sequence[int] | np.ndarray, at: int, first: int
) -> None:
    """One segment at place `at`, whose first token has position `first`."""
    n = len(tokens)
    if not n:
        return
    part = np.s_[row, at : at + n]
    batch["joint_tokens"][part] = tokens
    batch["joint_segments"][part] = segment
    batch["joint_positions"][part] = np.arange(first, first + n)
    batch["joint_prefixes"][part] = 1 if segment > 1 else 0
    batch["joint_previous"][part] = np.arange(at - 1, at + n - 1)
    batch["joint_previous"][row, at] = first - 1  # the end of the beginning, or -1 at the very start
