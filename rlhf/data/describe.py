"""A batch as a person reads it: what the model is trained on, token by token."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from rlhf.data.batches import Batch
from rlhf.model.tokenizer import Tokenizer

_SIDES = ("chosen", "rejected")


def describe_batch(batch: Batch, tokenizer: Tokenizer, n_rows: int = 2) -> str:
    """The first `n_rows` rows: their text, then a line a token with what the arrays say about it.

    `*` marks tokens that are trained on. Padding is counted, not listed.
    """
    shape = batch["tokens"].shape
    names = {2: "batch × time", 3: "batch × (chosen, rejected) × time"}
    lines = [
        f"tokens {' × '.join(map(str, shape))} ({names[len(shape)]}); {int(batch['is_answer'].sum())} trained on, "
        f"{int((batch['segments'] == 0).sum())} padding"
    ]
    if "images" in batch:
        _, n_slots, height, width, _ = batch["images"].shape
        n_filled = sum(int(_slot_of(batch, row).max()) for row in range(shape[0]))
        lines.append(
            f"images {shape[0]} × {n_slots} of {height} × {width} pixels (batch × slots); {n_filled} slots filled"
        )
    for place in range(min(n_rows, shape[0])):
        title = f"row {int(batch['row'][place])} of the dataset"
        if "is_desirable" in batch:
            title += ", desirable" if batch["is_desirable"][place] else ", undesirable"
        for side in range(2) if len(shape) == 3 else (None,):
            index = (place,) if side is None else (place, side)
            label = title if side is None else f"{title}, {_SIDES[side]}"
            lines += ["", f"--- {label} ---", *_row_lines(batch, index, tokenizer)]
    return "\n".join(lines)


def _row_lines(batch: Batch, index: tuple[int, ...], tokenizer: Tokenizer) -> Iterator[str]:
    segments, tokens = batch["segments"][index], batch["tokens"][index]
    slots = _slot_of(batch, index)
    for segment in range(1, int(segments.max()) + 1):
        yield _text(tokens[segments == segment], slots[segments == segment], tokenizer)
    yield ""
    yield "place  id      token                 segment  position  trained on"
    for place in np.flatnonzero(segments):
        if slots[place]:
            if slots[place] != slots[place - 1]:
                yield f"{place:5d}          {_named(slots, int(slots[place]))}"
            continue
        token = int(tokens[place])
        mark = "*" if batch["is_answer"][index][place] else ""
        spelt = tokenizer.piece(token).replace("\n", "\\n")
        yield (
            f"{place:5d}  {token:<6d}  {spelt:20s}  {segments[place]:7d}  {batch['positions'][index][place]:8d}  {mark}"
        ).rstrip()
    yield f"{int((segments == 0).sum())} of padding"


def _slot_of(batch: Batch, index: int | tuple[int, ...]) -> Int[np.ndarray, "*rows time"]:
    """For each token the image of its row that it is part of, counted from 1; 0 for text."""
    if "images" not in batch:
        return np.zeros_like(batch["tokens"][index])
    numbers = batch["soft_tokens"]
    # an image's first soft token stands behind text: what comes before it are whole images
    starts = np.unique(numbers[(numbers > 0) & (np.roll(numbers, 1, axis=-1) == 0)])
    return np.where(numbers[index] > 0, np.searchsorted(starts, numbers[index], side="right"), 0)


def _named(slots: Int[np.ndarray, "time"], slot: int) -> str:
    return f"<image {slot}: {int((slots == slot).sum())} tokens>"


def _text(tokens: Int[np.ndarray, "time"], slots: Int[np.ndarray, "time"], tokenizer: Tokenizer) -> str:
    ends = np.flatnonzero(np.diff(slots)) + 1
    parts = zip(np.split(tokens, ends), np.split(slots, ends), strict=True)

    def show(part, slot):
        return _named(slots, int(slot[0])) if slot[0] else tokenizer.decode(part.tolist(), show_control=True)

    return "".join(show(part, slot) for part, slot in parts if len(part)).rstrip("\n")
