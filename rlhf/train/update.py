"""One optimizer step: accumulate the gradient over microbatches, clip, update. Compiled once per batch shape.

The algorithm comes in as an argument: its numbers are traced leaves, so another beta or learning rate, in the same
process, runs the program that is already there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf.model.sharding import mesh_of, place_rows, put, shardings, whole
from rlhf.train.guard import TraceCounter

Tree = Any


def initial_state(trainable: Tree, algorithm: Any) -> dict[str, Tree]:
    """What an update changes: `params` (trained components), `optimizer`, and counts of updates done and skipped."""
    on_one_device = len(jax.tree.leaves(trainable)[0].sharding.device_set) == 1
    init = _compiled_init if on_one_device else initial_optimizer  # one program, but it would lose how arrays are split
    optimizer = init(algorithm, trainable)
    state = {"params": trainable, "optimizer": optimizer, "n_updates": jnp.int32(0), "n_skipped": jnp.int32(0)}
    mesh = mesh_of(trainable)
    return state if mesh is None else jax.tree.map(put, state, shardings(state, mesh))


def initial_optimizer(algorithm: Any, trainable: Tree) -> Tree:
    """The optimizer's state before the first update."""
    return algorithm.optimizer.transform(1.0).init(trainable)


_compiled_init = jax.jit(initial_optimizer)


def _microbatches(batch: Tree, size: int) -> tuple[Tree, Tree]:
    """(arrays [n, size, …], scalars). Microbatch i takes rows i, i + n, i + 2 n …: rows that are spread over devices
    in blocks stay spread in each microbatch."""

    def split(x):
        return x.reshape(size, x.shape[0] // size, *x.shape[1:]).swapaxes(0, 1)

    rows = {name: split(x) for name, x in batch.items() if x.ndim}
    return rows, {name: x for name, x in batch.items() if not x.ndim}


def _fold(name: str, values: jax.Array) -> jax.Array:
    """A metric of n microbatches as one number: the mean, or what its name ends in."""
    folds = {"max": jnp.max, "min": jnp.min}
    return folds.get(name.rsplit("/", 1)[-1], jnp.mean)(values)


def loss_and_gradient(trainable: Tree, frozen: Tree, batch: Tree, algorithm: Any, model: Any) -> tuple:
    """(metrics with `loss`, gradient), each the mean over the rows of the whole batch."""

    def loss(params, rows):
        noise = {"noise": rows["noise"]} if "noise" in rows else {}
        return algorithm.loss(model, {**frozen, **noise, **params}, rows)

    grad = jax.value_and_grad(loss, has_aux=True)
    rows, scalars = _microbatches(batch, algorithm.rows_at_once(batch))
    n = jax.tree.leaves(rows)[0].shape[0]
    if n == 1:
        (value, metrics), gradient = grad(trainable, {**jax.tree.map(lambda x: x[0], rows), **scalars})
        return {"loss": value, **metrics}, gradient

    def accumulate(total, microbatch):
        (value, metrics), gradient = grad(trainable, {**microbatch, **scalars})
        return jax.tree.map(lambda t, g: t + g / n, total, gradient), {"loss": value, **metrics}

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    gradient, metrics = jax.lax.scan(accumulate, zeros, rows)
    return {name: _fold(name, values) for name, values in metrics.items()}, gradient


def _scaled(tree: Tree, by: Any) -> Tree:
    return jax.tree.map(lambda x: (x * by).astype(x.dtype), tree)


def eager_update(
    state: Tree, frozen: Tree, batch: Tree, algorithm: Any, n_updates: Any, *, model: Any, mesh: Any = None
) -> tuple[Tree, Tree]:
    """One optimizer step of `n_updates` in all; returns the new state and the step's metrics.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they were and counts as skipped;
    the loop decides whether the run goes on. mesh: on which the state is; the new one is split over it in the same way.
    """
    metrics, gradient = loss_and_gradient(state["params"], frozen, batch, algorithm, model)
    norms = {}
    for group in algorithm.clip_groups(tuple(gradient)):
        part = {name: gradient[name] for name in group}
        norms[group[0]] = norm = optax.tree.norm(part)
        gradient = {**gradient, **_scaled(part, jnp.minimum(1.0, algorithm.clip_norm / jnp.maximum(norm, 1e-30)))}
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(jnp.stack(list(norms.values()))).all()

    rates = algorithm.learning_rates(tuple(gradient), state["n_updates"], n_updates)
    # every optimizer is linear in its learning rate
    changes, optimizer = algorithm.optimizer.step(gradient, state["optimizer"], state["params"], is_finite)
    changes = {
        name: jax.tree.map(lambda x, by=rates[name]: (x * by).astype(x.dtype), changes[name]) for name in changes
    }
    params = optax.apply_updates(state["params"], changes)

    params = jax.tree.map(lambda before, after: jnp.where(is_finite, after, before), state["params"], params)
    skipped = state["n_skipped"] + jnp.where(is_finite, 0, 1)
    after = {"params": params, "optimizer": optimizer, "n_updates": state["n_updates"] + 1, "n_skipped": skipped}
    if mesh is not None:  # else the compiler may choose, and the next step would be another program
        after = jax.lax.with_sharding_constraint(after, shardings(after, mesh))
    first, *others = norms
    metrics |= {"grad_norm": norms[first], "learning_rate": rates[first], "n_skipped": skipped}
    for name in others:
        metrics |= {f"grad_norm/{name}": norms[name], f"learning_rate/{name}": rates[name]}
    return after, metrics


_counted = TraceCounter(eager_update, "the training step")  # says in the log why it is compiled again
update = jax.jit(_counted, static_argnames=("model", "mesh"), donate_argnames=("state",))


def eager_measure(params: Tree, batch: Tree, algorithm: Any, *, model: Any) -> Tree:
    """Loss and metrics of a batch, without a gradient: for held-out data."""
    value, metrics = algorithm.loss(model, params, batch)
    return {"loss": value, **metrics}


measure = jax.jit(eager_measure, static_argnames=("model",))


def measure_all(
    params: Tree, batch: Tree, algorithm: Any, model: Any, run: Any = measure, mesh: Any = None
) -> dict[str, float]:
    """`measure` over a prepared set of any size, a microbatch at a time; every row weighs the same."""
    n_rows, size = len(batch["row"]), algorithm.rows_at_once(batch)
    batch = jax.tree.map(np.asarray, whole(batch))  # slicing on a device would be a program of its own
    sums: dict[str, list[tuple[int, Any]]] = {}
    for start in range(0, n_rows, size):
        part = {name: x[start : start + size] if x.ndim else x for name, x in batch.items()}
        for name, value in run(params, place_rows(part, mesh), algorithm, model=model).items():
            sums.setdefault(name, []).append((len(part["row"]), value))
    return {name: _weighted(name, parts) for name, parts in sums.items()}


def _weighted(name: str, parts: list[tuple[int, Any]]) -> float:
    values = [float(value) for _, value in parts]
    ending = name.rsplit("/", 1)[-1]
    if ending in ("max", "min"):
        return max(values) if ending == "max" else min(values)
    return sum(n * v for (n, _), v in zip(parts, values, strict=True)) / sum(n for n, _ in parts)
