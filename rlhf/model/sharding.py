"""Where arrays live: one table of rules from parameter names to mesh axes.

Axes of the mesh: `data` (rows of the batch), `fsdp` (rows too, and a slice of every matrix), `tensor` (heads,
feed-forward columns and vocabulary). An axis that does not divide a dimension is left out of that dimension, and
`place` says so.
"""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from rlhf.errors import ConfigError
from rlhf.model.lora import PROJECTIONS

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")

# by the last part of a parameter's path; the leading axis of layer arrays is `layers`
Axes = str | tuple[str, ...] | None  # of the mesh, that one dimension is split over

RULES: dict[str, tuple[Axes, ...]] = {
    "embedding": ("tensor", "fsdp"),
    "query": (None, "fsdp", "tensor", None),
    "key_value": (None, "fsdp", None, "tensor", None),
    "out": (None, "tensor", None, "fsdp"),
    "gate_up": (None, "fsdp", None, "tensor"),
    "down": (None, "tensor", "fsdp"),
    # of the vision tower
    "patch_kernel": (None, None, None, "fsdp"),
    "position": (None, "fsdp"),
    "query_key_value": (None, "fsdp", None, "tensor", None),
    "up": (None, "fsdp", "tensor"),
    "project": ("fsdp", None),
}

_ROW_SPLIT = ("o", "down")  # projections whose inputs are heads or feed-forward columns
# Matrices of adapters have one long side: A's inputs, B's outputs. It is split as that side of the projection is, and
# over fsdp in any case.
for _name in PROJECTIONS:
    _both: Axes = ("tensor", "fsdp")
    _a, _b = (_both, "fsdp") if _name in _ROW_SPLIT else ("fsdp", _both)
    RULES |= {f"{_name}.a": (None, _a, None), f"{_name}.b": (None, None, _b)}


def rule_name(path: tuple) -> str:
    """What a leaf's rule is listed under: its name; that of the codes, for codes and scales; projection and matrix."""
    names = [jax.tree_util.keystr((part,), simple=True) for part in path[-2:]]
    if len(names) == 2 and names[1] in ("qvalue", "scale"):
        return names[0]
    return ".".join(names) if len(names) == 2 and names[1] in ("a", "b") else "".join(names[-1:])


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh | None:
    """A mesh of the first data · fsdp · tensor devices; None for a single device, which needs none.

    Raises:
        ConfigError: there are fewer devices.
    """
    wanted, found = data * fsdp * tensor, len(jax.devices())
    if wanted > found:
        raise ConfigError(
            f"hardware.mesh=({data} data × {fsdp} fsdp × {tensor} tensor) needs {wanted} devices, JAX sees {found} "
            f"({jax.devices()[0].platform})"
        )
    if wanted == 1:
        return None
    devices = jax.devices()[:wanted]
    return jax.make_mesh((data, fsdp, tensor), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def spec(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The rule for one array. Arrays without one, and optimizer state of another shape, are on every device whole."""
    rule = RULES.get(rule_name(path))
    if rule is None or len(rule) != len(shape):
        return PartitionSpec()
    return PartitionSpec(*(_fitting(axes, n, mesh) for axes, n in zip(rule, shape, strict=True)))


def _fitting(axes: Axes, size: int, mesh: Mesh) -> Axes:
    """The first of the axes that together divide a dimension."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    while names and size % n_parts(names, mesh):
        names = names[:-1]
    return names if len(names) > 1 else names[0] if names else None


def n_parts(axes: Axes, mesh: Mesh) -> int:
    """How many ways a dimension is split."""
    return math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes or ()))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each array (or shape) of a tree whose last path parts are parameter names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec(path, getattr(x, "shape", ()), mesh)), tree
    )


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shapes that say where their arrays go; leaves that are no shapes of device arrays stay as they are."""

    def of(x, where):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=x.weak_type)

    return jax.tree.map(of, tree, shardings(tree, mesh))


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Put every array where its rule says; matrices that can't be split are named in the log."""
    if mesh is None:
        return tree
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        rule = RULES.get(rule_name(path), ())
        missed = [
            a for a, b in zip(rule, spec(path, x.shape, mesh), strict=False) if n_parts(a, mesh) > n_parts(b, mesh)
        ]
        if missed and math.prod(x.shape) > 1_000_000:
            log.warning(
                "%s %s can't be split over %s", jax.tree_util.keystr(path), x.shape, ", ".join(map(str, missed))
            )
    return jax.tree.map(put, tree, shardings(tree, mesh))


def put(x: Any, where: Sharding) -> jax.Array:
    """An array, the same in every process, on its devices; each process puts the parts that are its own."""
    if where.is_fully_addressable or not is_whole(x):
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def is_whole(x: Any) -> bool:
    """Whether this process has all of an array; not so where it lies on devices of several processes."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def whole(tree: Any) -> Any:
    """The same arrays, all of each in every process; those of one process as they are. All processes call it."""

    def of(x):
        if is_whole(x):
            return x
        if not x.is_fully_replicated:
            from jax.experimental import multihost_utils

            return jnp.asarray(multihost_utils.process_allgather(x, tiled=True))
        return jnp.asarray(np.asarray(x.addressable_data(0)))

    return jax.tree.map(of, tree)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree's arrays are spread over; None where they are on one device."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None  # type: ignore[return-value]


def place_rows(batch: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """A batch on the devices: every array split by rows, scalars on each; so are rows that don't divide evenly, such
    as the last of a held-out set."""
    if mesh is None:
        return {name: jax.device_put(x) for name, x in batch.items()}
    n_parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def of(x):
        is_split = x.ndim and x.shape[0] % n_parts == 0
        return NamedSharding(mesh, PartitionSpec(("data", "fsdp")) if is_split else PartitionSpec())

    return {name: put(x, of(x)) for name, x in batch.items()}
