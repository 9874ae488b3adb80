"""Where arrays live: one table of rules from parameter names to mesh axes.

Axes of the mesh: `data` (rows of the batch), `fsdp` (rows too, and a slice of every matrix), `tensor` (heads,
feed-forward columns and vocabulary). An axis that does not divide a dimension is left out of that dimension, and
`place` says so.
"""

import logging
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf.errors import ConfigError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")

# by the last part of a parameter's path; the leading axis of layer arrays is `layers`
RULES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", "fsdp"),
    "query": (None, "fsdp", "tensor", None),
    "key_value": (None, "fsdp", None, "tensor", None),
    "out": (None, "tensor", None, "fsdp"),
    "gate_up": (None, "fsdp", None, "tensor"),
    "down": (None, "tensor", "fsdp"),
}


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
    name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
    rule = RULES.get(name)
    if rule is None or len(rule) != len(shape):
        return PartitionSpec()
    fits = [axis if axis and n % mesh.shape[axis] == 0 else None for axis, n in zip(rule, shape, strict=True)]
    return PartitionSpec(*fits)


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
        rule = RULES.get(jax.tree_util.keystr(path[-1:], simple=True), ())
        missed = [
            a for a, b in zip(rule, spec(path, x.shape, mesh), strict=False) if a != b and mesh.shape[a or ""] > 1
        ]
        if missed and math.prod(x.shape) > 1_000_000:
            log.warning(
                "%s %s can't be split over %s", jax.tree_util.keystr(path), x.shape, ", ".join(map(str, missed))
            )
    return jax.device_put(tree, shardings(tree, mesh))


def place_rows(batch: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """A batch on the devices: every array split by rows, scalars on each; so are rows that don't divide evenly, such
    as the last of a held-out set."""
    if mesh is None:
        return {name: jax.device_put(x) for name, x in batch.items()}
    n_parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def of(x):
        is_split = x.ndim and x.shape[0] % n_parts == 0
        return NamedSharding(mesh, PartitionSpec(("data", "fsdp")) if is_split else PartitionSpec())

    return {name: jax.device_put(x, of(x)) for name, x in batch.items()}
