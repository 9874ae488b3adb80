"""A prepared batch cut into the parts of its optimizer steps, and their metrics put together again."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

Batch = dict[str, Any]


def minibatches(batch: Batch, algorithm: Any, key: jax.Array, is_noisy: bool) -> Iterator[Batch]:
    """The parts of a batch, one per optimizer step: in order if there is one, else shuffled each epoch.

    is_noisy: each part gets `noise`, a random number for each of its rows: however rows are cut into microbatches,
        each keeps its own.
    """
    for index, part in enumerate(_parts(batch, algorithm, jax.random.fold_in(key, 1))):
        if is_noisy:
            drawn = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, 2), index), (len(part["row"]),))
            part["noise"] = np.asarray(drawn)
        yield part


def _parts(batch: Batch, algorithm: Any, key: jax.Array) -> Iterator[Batch]:
    if algorithm.epochs * algorithm.minibatches == 1:
        yield dict(batch)
        return
    for epoch in range(algorithm.epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), len(batch["row"])))
        for rows in order.reshape(algorithm.minibatches, -1):
            yield {name: x[rows] if x.ndim else x for name, x in batch.items()}


def joined(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of a batch's optimizer steps as one row: the mean, or what a name ends in (`…/max`, `…/min`)."""
    folds = {"max": np.max, "min": np.min}
    return {
        name: float(folds.get(name.rsplit("/", 1)[-1], np.mean)([one[name] for one in metrics])) for name in metrics[0]
    }
