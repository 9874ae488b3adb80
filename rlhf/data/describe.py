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
    for segment in range(1, int(segments.max()) + 1):
        yield _text(tokens[segments == segment], tokenizer)
    yield ""
    yield "place  id      token                 segment  position  trained on"
    for place in np.flatnonzero(segments):
        token = int(tokens[place])
        mark = "*" if batch["is_answer"][index][place] else ""
        spelt = tokenizer.piece(token).replace("\n", "\\n")
        yield (
            f"{place:5d}  {token:<6d}  {spelt:20s}  {segments[place]:7d}  {batch['positions'][index][place]:8d}  {mark}"
        ).rstrip()
    yield f"{int((segments == 0).sum())} of padding"


def _text(tokens: Int[np.ndarray, "time"], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(tokens.tolist(), show_control=True).rstrip("\n")
