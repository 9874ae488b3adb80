"""From files to parameters on their devices, one piece at a time: never two copies of the model, nor of one leaf.

A leaf is made on its devices first. Then each piece (one layer of one array, or some rows of the embedding) is read as
the file has it, every device gets its part, and a compiled write turns, casts and puts it into place there.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints import blocks
from rlhf.model.checkpoints.arrays import Arrays, Stored
from rlhf.model.checkpoints.axes import Rule
from rlhf.model.checkpoints.matching import matched
from rlhf.model.checkpoints.names import Slot, leaf_shapes, sizes
from rlhf.model.gemma3 import Architecture
from rlhf.model.sharding import put, spec

log = logging.getLogger(__name__)

Tree = dict[str, Any]
Path = tuple[str, ...]  # of a leaf, from the component's name

Finish = Callable[[Path, Any], Any]


def as_read(path: Path, leaf: Any) -> Any:
    """The `finish` that changes nothing."""
    return leaf


PIECE_BYTES = 32 * 2**20  # of an array that is read in parts


@blocks.go_back()
def load(arrays: Arrays, a: Architecture, dtype: str, mesh: Mesh | None, finish: Finish = as_read) -> Tree:
    """The parameters `{"model": …}`, with `"vision"` where the model has a tower, in `dtype` and on their shards.

    finish: what each leaf becomes as soon as it is there, such as codes of fewer bits.

    Raises:
        CheckpointError: the checkpoint is of another model, incomplete or damaged; names file and array.
    """
    pairs, head = matched(arrays, a)
    by_leaf: dict[Path, list[tuple[Slot, Stored]]] = {}
    for slot, stored in pairs:
        by_leaf.setdefault(slot.entry.leaf, []).append((slot, stored))
    tree: Tree = {}
    embedding = ("model", "embedding")  # first: its reading takes the most memory
    for path in sorted(leaf_shapes(a), key=lambda path: path != embedding):
        *parents, name = path
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
        node[name] = finish(path, _Leaf(arrays, a, path, dtype, mesh).filled(by_leaf[path]))
        if path == embedding:
            _tell_padding(by_leaf[path][0][1], a)
            if head is not None:
                _require_tied(arrays, head, by_leaf[path][0][1])
    return tree


def finish_all(tree: Tree, finish: Finish, path: Path = ()) -> Tree:
    """`finish` for the leaves of a tree that came as a whole; what was there is let go of one by one."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            finish_all(tree[name], finish, (*path, name))
        else:
            tree[name] = finish((*path, name), tree.pop(name))
    return tree


def _tell_padding(stored: Stored, a: Architecture) -> None:
    if stored.shape[0] > a.vocab_size:
        n_extra = stored.shape[0] - a.vocab_size
        log.info("embedding: the last %d of %s rows are padding and left out", n_extra, f"{stored.shape[0]:,}")


def _require_tied(arrays: Arrays, head: Stored, embedding: Stored) -> None:
    """Gemma's output head is its embedding; one that differs would be lost."""
    if head.shape != embedding.shape:
        raise CheckpointError(f"{head} has shape {head.shape}, the embedding it should equal {embedding.shape}")
    step = max(1, PIECE_BYTES // max(1, 4 * embedding.shape[1]))
    for start in range(0, head.shape[0], step):
        stop = min(start + step, head.shape[0])
        if not np.array_equal(arrays.read(head, start, stop), arrays.read(embedding, start, stop)):
            raise CheckpointError(
                f"{head} differs from {embedding} (in rows {start} to {stop - 1}): Gemma 3's output head is its "
                "embedding, and this checkpoint has two"
            )


class _Leaf:
    """One of our arrays while it is being filled."""

    def __init__(self, arrays: Arrays, a: Architecture, path: Path, dtype: str, mesh: Mesh | None):
        self.arrays, self.sizes, self.shape, self.mesh = arrays, sizes(a), leaf_shapes(a)[path], mesh
        keys = tuple(jax.tree_util.DictKey(key) for key in path)
        given = PartitionSpec() if mesh is None else spec(keys, self.shape, mesh)
        self.axes = (*given, *[None] * (len(self.shape) - len(given)))  # of the mesh, for each axis of the array
        self.array = _zeros(self.shape, dtype, self._sharding(self.axes))

    def _sharding(self, axes: tuple[str | None, ...]) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def filled(self, pairs: list[tuple[Slot, Stored]]) -> jax.Array:
        for slot, stored in pairs:
            if slot.layer is not None:
                whole = self.arrays.read(stored, 0, stored.shape[0])
                self._write(slot.entry.rule, whole.reshape(slot.entry.rule.opened_shape(self.sizes)), slot.layer)
            elif slot.entry.leaf[-1] == "embedding":
                self._fill_by_rows(slot.entry.rule, _Rows(self.arrays, stored))
            else:
                whole = self.arrays.read(stored, 0, stored.shape[0])
                ours = slot.entry.rule.to_ours(whole.reshape(slot.entry.rule.opened_shape(self.sizes)))
                ours, where = ours.astype(self.array.dtype), self._sharding(self.axes)
                self.array = jax.device_put(ours) if where is None else put(ours, where)
        return self.array

    def _write(self, rule: Rule, opened: np.ndarray, layer: int) -> None:
        axes = tuple(self.axes[1 + rule.ours.index(letter)] for letter in rule.letters)
        piece = _spread(opened.shape, lambda index: opened[index], self._sharding(axes))
        write = _writer(rule, True, self._sharding(self.axes), self._sharding(axes))
        self._put(write, piece, layer)

    def _fill_by_rows(self, rule: Rule, rows: "_Rows") -> None:
        """Every part of the mesh gets the next rows of its own share."""
        n_parts = 1 if self.mesh is None or self.axes[0] is None else self.mesh.shape[self.axes[0]]
        n_rows, width = self.shape
        share = n_rows // n_parts
        step = min(share, max(1, PIECE_BYTES // (rows.row_bytes * n_parts)))
        write = _writer(rule, False, self._sharding(self.axes), self._sharding(self.axes))
        for start in range(0, share, step):
            start = min(start, share - step)  # the last piece has the size of the others: it writes some rows again

            def part(index: tuple[slice, ...], start: int = start) -> np.ndarray:
                number = (index[0].start or 0) // step
                return rows(number * share + start, step)[:, index[1]]

            piece = _spread((n_parts * step, width), part, self._sharding(self.axes))
            self._put(write, piece, start)

    def _put(self, write: Callable, piece: jax.Array, start: int) -> None:
        """One write runs while the next piece is read; without waiting, pieces that were read would pile up."""
        self.array = write(jax.block_until_ready(self.array), piece, np.int32(start))


class _Rows:
    """Rows of a stored matrix. Where they can't be had for less, a whole block is read and kept for the next ones."""

    def __init__(self, arrays: Arrays, stored: Stored):
        self.arrays, self.stored, self.unit = arrays, stored, arrays.rows_at_once(stored)
        self.row_bytes = stored.shape[1] * np.dtype(stored.dtype).itemsize
        self._block = (0, np.zeros((0, stored.shape[1]), stored.dtype))

    def __call__(self, start: int, n_rows: int) -> np.ndarray:
        if self.unit == 1:
            return self.arrays.read(self.stored, start, start + n_rows)
        first, block = self._block
        if not first <= start <= start + n_rows <= first + len(block):
            self._block = (0, block[:0])  # let go of before the next is read
            first = start // self.unit * self.unit
            last = -(-(start + n_rows) // self.unit) * self.unit
            block = self.arrays.read(self.stored, first, min(last, self.stored.shape[0]))
            self._block = (first, block)
        return block[start - first : start - first + n_rows]


def _zeros(shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None) -> jax.Array:
    return jnp.zeros(shape, dtype) if sharding is None else jnp.zeros(shape, dtype, device=sharding)


def _spread(
    shape: tuple[int, ...], part: Callable[[tuple[slice, ...]], np.ndarray], sharding: NamedSharding | None
) -> jax.Array:
    if sharding is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)  # type: ignore[arg-type]


@functools.cache
def _writer(rule: Rule, is_stacked: bool, leaf: NamedSharding | None, piece: NamedSharding | None) -> Callable:
    """The program that turns, casts and writes a piece, each device its own part; the leaf is overwritten."""

    def write(array: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        ours = rule.to_ours(part)
        places = [rule.places.get(axis, 0) for axis in range(ours.ndim)]
        if is_stacked:
            ours, places = ours[None], [0, *places]
        # as bits: on CPU, XLA would turn all of a bfloat16 array into float32 and back to write a part of it
        bits = f"uint{8 * array.dtype.itemsize}"
        whole, part = (jax.lax.bitcast_convert_type(x, bits) for x in (array, ours.astype(array.dtype)))
        written = jax.lax.dynamic_update_slice(whole, part, [start, *places[1:]])
        return jax.lax.bitcast_convert_type(written, array.dtype)

    if leaf is not None and piece is not None:
        specs = (leaf.spec, piece.spec, PartitionSpec())
        write = jax.shard_map(write, mesh=leaf.mesh, in_specs=specs, out_specs=leaf.spec, check_vma=False)
    return jax.jit(write, donate_argnums=0)
