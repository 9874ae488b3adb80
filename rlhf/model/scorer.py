"""Scores of token sequences by a model with a head, in batches of few shapes, so that little is compiled."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from rlhf.model.head import last_hidden, output
from rlhf.model.sharding import mesh_of, place_rows, whole

Tree = dict[str, Any]

SHORTEST = 64  # time axis of the smallest shape; each further one is twice as long


class Scorer:
    """params: of the model, with its `head`. rows: scored at once; the last batch is filled up.

    n_time: the time axis of every batch; None: of each batch the shortest of 64, 128, 256 … that holds it.
    """

    def __init__(self, model: Any, params: Tree, rows: int, n_time: int | None = None):
        self.model, self.params, self.rows, self.n_time = model, params, rows, n_time
        self.mesh = mesh_of(params)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> Float[np.ndarray, "n"]:
        """The normalised output at the last token of each sequence."""
        scores = np.zeros(len(sequences), np.float32)
        pending = []  # the device goes on while the next batch is made
        for places, batch in self._batches(sequences):
            pending.append((places, _scores(self.model, self.params, place_rows(batch, self.mesh))))
        for places, found in pending:
            scores[places] = np.asarray(whole(found))[: len(places)]
        return scores

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tree]]:
        """The sequences, the shortest first, and the place of each."""
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
        for start in range(0, len(order), self.rows):
            places = order[start : start + self.rows]
            longest = len(sequences[places[-1]])
            shape = (self.rows, self.n_time or SHORTEST * 2 ** max(0, (-(-longest // SHORTEST) - 1).bit_length()))
            batch: Tree = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "positions")}
            for row, place in enumerate(places):
                n = len(sequences[place])
                batch["tokens"][row, :n] = sequences[place]
                batch["segments"][row, :n] = 1
                batch["positions"][row, :n] = np.arange(n)
            yield places, {**batch, "is_answer": batch["segments"] > 0}


@functools.partial(jax.jit, static_argnames="model")
def _scores(model: Any, params: Tree, batch: Tree) -> Float[Array, "rows"]:
    return output(params["head"], last_hidden(model, params, batch))
