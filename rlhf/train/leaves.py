"""A tree of arrays as a flat table of named arrays, and back: what a checkpoint stores and what it checks.

Names come from the path in the tree ("params/layers/query", "optimizer/0/mu/…"), so a tree of named tuples, lists and
configs needs only its leaves on the disk; the structure comes from the tree it is restored onto. Knows no files.
"""

import dataclasses
import functools
import hashlib
import math
from typing import Any, Literal
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from rlhf.model.sharding import is_whole, put, whole

Tree = Any
Path = tuple[str | int, ...]

# Dtypes the array store writes as they are. Any other (4-bit integers, 8-bit floats) is stored as its bytes.
_PLAIN = {"bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_PIECE_BYTES = 64 * 2**20  # that every device gets at once, of an array that is gathered from several processes
_LONGEST = 200  # characters of a folder's name; file systems allow 255


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a checkpoint says of one leaf.

    path: where it is in the tree; an int is a place in a list or tuple.
    kind: a jax array, a numpy array, or a Python number.
    shape, dtype: of the leaf (for random keys: of the key array, "key<fry>").
    sha256: of its bytes in C order (for random keys: of the key data).
    weak_type: JAX's flag that lets an array promote like a Python number.
    key_impl: name of the generator, for random keys.
    """

    path: Path
    kind: Literal["jax", "numpy", "number"]
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    weak_type: bool = False
    key_impl: str | None = None

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def folder(self) -> str:
        return folder_of(self.path)

    @property
    def is_empty(self) -> bool:
        """Whether it has no elements, so that nothing is stored."""
        return 0 in self.shape


def name_of(path: Path) -> str:
    """The name of an array as messages show it."""
    return "/".join(str(part) for part in path)


def folder_of(path: Path) -> str:
    """The name of an array's folder in the array store: one folder an array, whatever its keys are."""
    name = ".".join(quote(str(part), safe="").replace(".", "%2E") for part in path) or "array"
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}.{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _part(key: Any) -> str | int:
    match key:
        case SequenceKey(idx=place) | FlattenedIndexKey(key=place):
            return place
        case GetAttrKey(name=name):
            return name
        case DictKey(key=name):
            return str(name)
    raise TypeError(f"a tree node with keys of type {type(key).__name__} can't be named")


def flatten(tree: Tree) -> dict[Path, Any]:
    """The leaves of a tree by path, in the tree's order.

    Raises:
        TypeError: two leaves would have the same name, or a leaf is not an array or a number.
    """
    leaves: dict[Path, Any] = {}
    names: set[str] = set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = tuple(_part(key) for key in keys)
        if name_of(path) in names:
            raise TypeError(f"two arrays of the tree are called {name_of(path)!r}")
        if not (hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)):
            raise TypeError(f"{name_of(path)} is a {type(leaf).__name__}, not an array or a number")
        names.add(name_of(path))
        leaves[path] = leaf
    return leaves


def empty_dicts(tree: Tree) -> list[Path]:
    """The paths of empty dicts, which have no leaves to tell of them."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, dict) and not node)[0]
    return [tuple(_part(key) for key in keys) for keys, node in nodes if isinstance(node, dict)]


def nest(leaves: dict[Path, Any], empty: list[Path]) -> Tree:
    """The dicts and lists that flatten to `leaves`; named tuples become lists or dicts, as their paths say."""
    if () in leaves:
        return leaves[()]
    tree: dict = {}
    for path, leaf in [*leaves.items(), *((path, {}) for path in empty)]:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        if path:
            node[path[-1]] = leaf
    return _with_lists(tree)


def _with_lists(node: Tree) -> Tree:
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child) for key, child in node.items()}
    if children and all(isinstance(key, int) for key in children):
        return [children[key] for key in sorted(children)]
    return children


def n_bytes(entry: Entry) -> int:
    """Bytes of the array of an entry, where that is more than a few."""
    return 0 if entry.key_impl else math.prod(entry.shape) * jnp.dtype(entry.dtype).itemsize


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def dtype_name(leaf: Any) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else str(np.asarray(leaf).dtype)


def stored_form(leaf: Any) -> jax.Array | np.ndarray:
    """The array that is written for a leaf: key data for random keys, bytes for dtypes the store does not know."""
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not is_whole(leaf):
        leaf = _gathered(leaf)
    if dtype_name(leaf) not in _PLAIN:
        array = np.asarray(leaf)
        return array.view(np.dtype(f"uint{8 * array.dtype.itemsize}"))
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if leaf.is_fully_replicated:  # one copy is enough, and the store need not cut it into pieces
        return leaf.addressable_shards[0].data
    return leaf


def _gathered(array: jax.Array) -> np.ndarray:
    """An array that lies on devices of several processes, in the memory of each, a piece at a time. All call it."""
    if array.ndim == 0 or array.is_fully_replicated:
        return np.asarray(whole(array))
    gathered = np.empty(array.shape, array.dtype)
    n_rows = array.shape[0]
    step = max(1, min(n_rows, _PIECE_BYTES * n_rows // max(array.nbytes, 1)))
    for start in range(0, n_rows, step):
        start = min(start, n_rows - step)  # the last piece has the size of the others
        gathered[start : start + step] = whole(_piece(array, np.int32(start), step))
    return gathered


@functools.partial(jax.jit, static_argnums=2)
def _piece(array: jax.Array, start: jax.Array, n_rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, n_rows)


def stored_form_of_nothing(entry: Entry) -> np.ndarray:
    """`stored_form` of a leaf without elements, which the store refuses to hold."""
    if entry.key_impl:
        data = jax.random.key_data(jax.random.key(0, impl=entry.key_impl))
        return np.zeros((*entry.shape, *data.shape), data.dtype)
    return np.asarray(stored_form(np.zeros(entry.shape, jnp.dtype(entry.dtype))))


def digest(array: jax.Array | np.ndarray) -> str:
    """SHA-256 of an array's bytes in C order, whatever its sharding, in hex."""
    flat = np.ascontiguousarray(np.asarray(array)).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).hexdigest()


def describe(path: Path, leaf: Any, sha256: str) -> Entry:
    """The entry of a leaf whose stored form has this digest."""
    is_array = hasattr(leaf, "dtype")
    return Entry(
        path=path,
        kind="jax" if isinstance(leaf, jax.Array) else "numpy" if is_array else "number",
        shape=tuple(np.shape(leaf)),
        dtype=dtype_name(leaf),
        sha256=sha256,
        weak_type=bool(getattr(leaf, "weak_type", False)),
        key_impl=str(jax.random.key_impl(leaf)) if is_key(leaf) else None,
    )


def abstract(entry: Entry) -> Any:
    """A target that restores this leaf as it was, where JAX likes to put it; its value means nothing."""
    if entry.kind == "number":
        return np.zeros((), entry.dtype).item()
    if entry.kind == "numpy":
        return np.broadcast_to(np.zeros((), jnp.dtype(entry.dtype)), entry.shape)
    dtype = jax.random.key(0, impl=entry.key_impl).dtype if entry.key_impl else jnp.dtype(entry.dtype)
    return jax.ShapeDtypeStruct(entry.shape, dtype, weak_type=entry.weak_type)


def sharding_of(target: Any) -> jax.sharding.Sharding | None:
    """Where the target wants its array; None where JAX may choose (an array that no one placed)."""
    if isinstance(target, jax.Array) and not target.committed:
        return None
    return getattr(target, "sharding", None)


def is_direct(entry: Entry, target: Any) -> bool:
    """Whether the store can read the array straight onto the target's device; else it comes by the host.

    Not onto several: the store reads their shards at the same time, and now and then fails at that.
    """
    where = sharding_of(target)
    is_one = where is not None and where.is_fully_addressable and len(where.device_set) == 1
    return is_one and entry.key_impl is None and entry.dtype in _PLAIN


def like_target(stored: jax.Array | np.ndarray, entry: Entry, target: Any) -> Any:
    """The leaf that replaces `target`: of its kind (jax, numpy, number), placement and weak type.

    stored: what the store returned: a jax.Array in its place if `is_direct`, else a numpy array.
    """
    sharding = sharding_of(target)
    if entry.key_impl is not None:
        keys = jax.random.wrap_key_data(jnp.array(stored), impl=entry.key_impl)
        return keys if sharding is None else jax.device_put(keys, sharding)
    if entry.dtype not in _PLAIN:
        stored = np.asarray(stored).view(jnp.dtype(entry.dtype))
    if isinstance(target, np.ndarray | np.generic):
        return np.asarray(stored) if isinstance(target, np.ndarray) else np.asarray(stored)[()]
    if isinstance(target, bool | int | float | complex):
        return np.asarray(stored).item()
    if isinstance(stored, np.ndarray):
        stored = jnp.array(stored) if sharding is None else put(stored, sharding)
    return _weakly_typed(stored) if getattr(target, "weak_type", False) else stored


def _weakly_typed(array: jax.Array) -> jax.Array:
    zero = jnp.asarray(array.dtype.type(0).item())  # a Python number makes a weakly typed array; `at` keeps the flag
    return jnp.broadcast_to(zero, array.shape).at[...].set(array)
