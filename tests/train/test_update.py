"""One optimizer step: the gradient does not depend on how it is cut up, and what follows is what the papers say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf.algorithms.base import Algorithm, Runtime
from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.sft import SFT
from rlhf.config import config
from rlhf.data.arithmetic import Arithmetic
from rlhf.data.batches import collate
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.tokenizer import Tokenizer
from rlhf.ops.optimizers import Adafactor, AdamW, Constant, Cosine, Linear, Lion, RMSProp, decays
from rlhf.train.update import initial_state, loss_and_gradient, measure_all, update

ARCHITECTURE = Architecture(
    vocab_size=1024, width=32, ff_width=48, layers=2, heads=4, kv_heads=2, head_width=8, query_scale=8**-0.5,
    window=8, pattern=2,
)  # fmt: skip
MODEL = Gemma3(ARCHITECTURE)
SIZES = {"batch_size": 16, "microbatch_size": 16, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def params():
    return {"model": jax.device_put(MODEL.initialise(0), may_alias=False)}


def conversations(n_rows: int, time: int = 48) -> dict[str, np.ndarray]:
    """Rows of 2 to 48 tokens, with from one to nearly all of them supervised."""
    rng = np.random.default_rng(0)
    place = np.arange(time)[None]
    n_tokens = np.linspace(2, time, n_rows).astype(int)[:, None]
    n_answer = np.clip(rng.integers(1, time, (n_rows, 1)) * rng.random((n_rows, 1)), 1, n_tokens - 1).astype(int)
    is_token = place < n_tokens
    return {
        "tokens": rng.integers(1, 1024, (n_rows, time), dtype=np.int32) * is_token,
        "is_answer": is_token & (place >= n_tokens - n_answer),
        "segments": is_token.astype(np.int32),
        "positions": (place * is_token).astype(np.int32),
        "row": np.arange(n_rows, dtype=np.int32),
    }


def pairs(n_pairs: int) -> dict[str, np.ndarray]:
    rows = conversations(2 * n_pairs)
    order = np.random.default_rng(1).permutation(2 * n_pairs).reshape(n_pairs, 2)
    return {**{name: x[order] for name, x in rows.items()}, "row": np.arange(n_pairs, dtype=np.int32)}


def difference(found, expected) -> tuple[float, float]:
    """Between two gradients: the largest of any number, and the norm of all as a share of the expected one."""
    apart = jax.tree.map(jnp.subtract, found, expected)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(apart))
    return largest, float(optax.tree.norm(apart) / optax.tree.norm(expected))


gradient_of = jax.jit(loss_and_gradient, static_argnums=4)


@pytest.mark.parametrize("form", ["conversation", "preference"])
def test_the_gradient_does_not_depend_on_microbatches(params, form):
    if form == "conversation":
        algorithm = SFT(**SIZES)
        batch = algorithm.prepare(Runtime(MODEL, None), params, conversations(16), jax.random.key(0))
    else:
        algorithm = DPO(**SIZES, sft_weight=0.5)
        batch = pairs(16)
        batch |= {"reference_logprobs": np.zeros(batch["tokens"].shape, np.float32)}
        batch |= {"sft_token_weight": algorithm.sft_weighting(batch["is_answer"][:, 0])}
    whole, expected = gradient_of(params, {}, batch, algorithm, MODEL)
    assert all(jnp.any(x) for x in jax.tree.leaves(expected))
    for size in (4, 1) if form == "conversation" else (4,):
        metrics, gradient = gradient_of(params, {}, batch, dataclasses.replace(algorithm, microbatch_size=size), MODEL)
        largest, share = difference(gradient, expected)
        assert largest < 1e-6
        assert share < 2e-6
        for name in whole:
            np.testing.assert_allclose(metrics[name], whole[name], rtol=2e-6, atol=2e-6, err_msg=name)


def test_packing_changes_neither_loss_nor_gradient(params):
    tokenizer = Tokenizer(None)
    settings = {"n_train": 24, "n_eval": 4, "max_length": 128}
    algorithm = SFT(**SIZES | {"batch_size": 24, "microbatch_size": 24})
    found = {}
    for packing in (True, False):
        examples = Arithmetic(**settings, packing=packing).load("train", "conversation", tokenizer)
        batch = collate(examples, range(len(examples.packs)))
        assert len(batch["row"]) == 24 if not packing else len(batch["row"]) < 14
        prepared = algorithm.prepare(Runtime(MODEL, tokenizer), params, batch, jax.random.key(0))
        sized = dataclasses.replace(algorithm, batch_size=len(batch["row"]), microbatch_size=len(batch["row"]))
        found[packing] = gradient_of(params, {}, prepared, sized, MODEL)
    (packed, packed_gradient), (alone, gradient) = found[True], found[False]
    np.testing.assert_allclose(packed["loss"], alone["loss"], rtol=1e-6)
    assert max(difference(packed_gradient, gradient)) < 1e-5


@config
class Regression(Algorithm):
    """The least squares of a line: every number can be worked out by hand."""

    form = "conversation"

    def prepare(self, runtime, params, batch, key):
        return batch

    def loss(self, model, params, batch):
        p = params["model"]
        predicted = batch["x"] @ p["matrix"] * (1 + p["final_norm"])[None, :]
        error = jnp.sum((predicted - batch["y"]) ** 2, axis=-1)
        return jnp.mean(error), {"error/max": jnp.max(error), "error/mean": jnp.mean(error)}


def line(**settings) -> Regression:
    return Regression(
        **{"batch_size": 4, "microbatch_size": 2, "learning_rate": 0.1, "schedule": Constant()} | settings
    )


def problem() -> tuple[dict, dict]:
    """(parameters, batch)"""
    rng = np.random.default_rng(0)
    params = {"model": {"matrix": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "final_norm": jnp.full(2, 0.3)}}
    x, y = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)
    return params, {"x": x, "y": y, "row": np.arange(4, dtype=np.int32)}


def by_hand(params: dict, batch: dict) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(error of each row, gradient of their mean)"""
    matrix, scale = np.float64(params["model"]["matrix"]), 1 + np.float64(params["model"]["final_norm"])
    product = batch["x"] @ matrix
    residual = product * scale - batch["y"]
    gradient = {
        "matrix": batch["x"].T @ (2 * residual * scale) / 4,
        "final_norm": (2 * residual * product).sum(0) / 4,
    }
    return (residual**2).sum(1), gradient


def step(params: dict, batch: dict, algorithm: Algorithm, n_steps: int = 1) -> tuple[dict, dict]:
    """(state, metrics) after some steps on the same batch."""
    algorithm = jax.tree.map(jnp.float32, algorithm)
    state = initial_state(jax.tree.map(jnp.copy, params), algorithm)
    for _ in range(n_steps):
        state, metrics = update(state, {}, batch, algorithm, jnp.int32(10), model=None)
    return state, metrics


def test_metrics_of_a_step_by_hand():
    params, batch = problem()
    errors, gradient = by_hand(params, batch)
    _, metrics = step(params, batch, line(learning_rate=0.0))
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    np.testing.assert_allclose(metrics["loss"], errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["error/mean"], errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["error/max"], errors.max(), rtol=1e-5)  # of both microbatches, not their mean
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["n_skipped"] == 0


def test_held_out_rows_weigh_the_same_whatever_the_slices():
    params, batch = problem()
    errors, _ = by_hand(params, batch)
    batch = {name: x[:3] for name, x in batch.items()} | {"scalar": np.float32(1)}
    found = measure_all(params, batch, line(), None)  # two rows, then one
    assert found["error/mean"] == pytest.approx(errors[:3].mean(), rel=1e-5)
    assert found["loss"] == pytest.approx(errors[:3].mean(), rel=1e-5)
    assert found["error/max"] == pytest.approx(errors[:3].max(), rel=1e-5)


def adamw(p, gradients, rate, b1=0.9, b2=0.95, eps=1e-8, decay=0.1, is_matrix=True):
    """Loshchilov and Hutter (2019), algorithm 2."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * is_matrix * p)
    return p


def rmsprop(p, gradients, rate, decay=0.99, eps=1e-8, weight_decay=0.1, is_matrix=True):
    v = 0.0
    for g in gradients:
        v = decay * v + (1 - decay) * g**2
        p = p - rate * (g / np.sqrt(v + eps) + weight_decay * is_matrix * p)
    return p


def lion(p, gradients, rate, b1=0.9, b2=0.99, decay=0.1, is_matrix=True):
    """Chen et al. (2023), algorithm 2."""
    m = 0.0
    for g in gradients:
        p = p - rate * (np.sign(b1 * m + (1 - b1) * g) + decay * is_matrix * p)
        m = b2 * m + (1 - b2) * g
    return p


def test_a_traced_number_is_in_any_range():
    assert jax.jit(lambda rate: line(learning_rate=rate).learning_rate)(-np.inf) == -np.inf


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [(AdamW(weight_decay=0.1), adamw), (RMSProp(weight_decay=0.1), rmsprop), (Lion(weight_decay=0.1), lion)],
    ids=["adamw", "rmsprop", "lion"],
)
@pytest.mark.parametrize("clip", [np.inf, 0.05], ids=["", "clipped"])
def test_two_steps_of_each_optimizer_by_hand(optimizer, rule, clip):
    params, batch = problem()
    algorithm = line(optimizer=optimizer, clip_norm=clip, learning_rate=0.01)
    state, _ = step(params, batch, algorithm, n_steps=2)
    seen, gradients = params, []
    for _ in range(2):
        _, gradient = by_hand(seen, batch)
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        gradients.append({name: g * min(1.0, clip / norm) for name, g in gradient.items()})
        after = {
            name: rule(np.float64(p), [g[name] for g in gradients], 0.01, is_matrix=name == "matrix")
            for name, p in params["model"].items()
        }
        seen = {"model": after}
    for name, expected in seen["model"].items():
        np.testing.assert_allclose(state["params"]["model"][name], expected, rtol=1e-5, err_msg=name)
        assert not np.array_equal(state["params"]["model"][name], params["model"][name])


def test_adafactor_is_optax_and_keeps_rows_and_columns_only():
    params = {"model": {"matrix": jnp.ones((256, 192)), "final_norm": jnp.ones(8)}}
    optimizer = Adafactor(weight_decay=0.1)
    found = optimizer.transform(0.01)
    expected = optax.adafactor(
        0.01, multiply_by_parameter_scale=False, decay_rate=0.8, weight_decay_rate=None, weight_decay_mask=None
    )
    state, other = found.init(params), expected.init(params)
    sizes = sorted(x.size for x in jax.tree.leaves(state))
    assert sizes[-1] == 256  # no second moment of 256 × 192
    for i in range(3):
        gradient = jax.tree.map(lambda x, i=i: jnp.sin(jnp.arange(x.size) + i).reshape(x.shape), params)
        changes, state = found.update(gradient, state, params)
        plain, other = expected.update(gradient, other, params)
        # decay is the learning rate's share of the matrix, and nothing of the norm
        np.testing.assert_allclose(
            changes["model"]["matrix"], plain["model"]["matrix"] - 0.001 * params["model"]["matrix"], atol=1e-7
        )
        np.testing.assert_allclose(changes["model"]["final_norm"], plain["model"]["final_norm"], atol=1e-7)


def test_weight_decay_is_for_matrices_only():
    wanted = decays(MODEL.abstract())
    kept = {jax.tree_util.keystr(path): bool(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    assert len(kept) == 13
    assert {name for name, is_decayed in kept.items() if not is_decayed} == {n for n in kept if "norm" in n}
    assert sum(kept.values()) == 6  # embedding, query, key_value, out, gate_up, down


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), {0: 1, 50: 1, 99: 1}),
        (Constant(warmup=0.1), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
        (Linear(warmup=0.1, end=0.0), {0: 0.1, 9: 1, 10: 1, 55: 0.5, 99: 1 / 90}),
        (Linear(warmup=0.0, end=0.2), {0: 1, 50: 0.6, 99: 0.208}),
        (Cosine(warmup=0.1, end=0.0), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 55: 0.5, 40: 0.75, 70: 0.25}),
        (Cosine(warmup=0.2, end=0.1), {19: 1, 60: 0.55, 100: 0.1, 120: 0.1}),
    ],
    ids=repr,
)
def test_schedules_by_hand(schedule, expected):
    for at, share in expected.items():
        assert float(schedule(jnp.int32(at), jnp.int32(100))) == pytest.approx(share, rel=1e-5), at


def test_the_learning_rate_of_each_step_follows_the_schedule():
    params, batch = problem()
    rates = [step(params, batch, line(schedule=Linear(warmup=0.2, end=0.0)), n)[1]["learning_rate"] for n in (1, 2, 7)]
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.1 * (1 - 4 / 8)], rtol=1e-6)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(poison):
    params, batch = problem()
    algorithm = jax.tree.map(jnp.float32, line(optimizer=AdamW(weight_decay=0.1)))
    state = initial_state(jax.tree.map(jnp.copy, params), algorithm)
    state, _ = update(state, {}, batch, algorithm, jnp.int32(10), model=None)
    before = jax.tree.map(np.asarray, state)
    bad = {**batch, "x": np.array(batch["x"])}
    bad["x"][2, 1] = np.nan if poison == "loss" else 1e15  # squares of 1e15 are finite, their products are not
    bad["y"] = batch["y"] if poison == "loss" else np.float32(batch["y"] * 1e19)
    state, metrics = update(state, {}, bad, algorithm, jnp.int32(10), model=None)
    assert not np.isfinite(metrics["grad_norm"])
    for name in ("params", "optimizer"):
        assert jax.tree.all(jax.tree.map(np.array_equal, before[name], state[name])), name
    assert state["n_skipped"] == metrics["n_skipped"] == 1
    assert state["n_updates"] == before["n_updates"] + 1  # the schedule goes on
    state, metrics = update(state, {}, batch, algorithm, jnp.int32(10), model=None)
    assert metrics["n_skipped"] == 1
    assert np.isfinite(metrics["grad_norm"])
    assert not np.array_equal(state["params"]["model"]["matrix"], before["params"]["model"]["matrix"])


def test_bfloat16_compute_with_float32_weights(params):
    algorithm = SFT(**SIZES)
    batch = algorithm.prepare(Runtime(MODEL, None), params, conversations(16), jax.random.key(0))
    half = Gemma3(ARCHITECTURE, "bfloat16")
    traced = str(jax.make_jaxpr(half.token_logprobs)(params, batch))
    assert "bf16[16,48,32]" in traced  # the residual stream
    (full, exact), (rough, gradient) = (gradient_of(params, {}, batch, algorithm, model) for model in (MODEL, half))
    assert rough["loss"].dtype == jnp.float32
    assert float(rough["loss"]) == pytest.approx(float(full["loss"]), rel=5e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    cosine = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, exact)), strict=True))
    cosine /= optax.tree.norm(gradient) * optax.tree.norm(exact)
    assert cosine > 0.99
    # Adam moves nearly every weight by about the learning rate: in bfloat16, where a step is 0.4 %, none would move
    transform = algorithm.optimizer.transform(1e-5)
    changes, _ = transform.update(gradient, transform.init(params), params)
    moved = optax.apply_updates(params, changes)["model"]["layers"]["query"] - params["model"]["layers"]["query"]
    assert moved.dtype == jnp.float32
    assert float(jnp.mean((jnp.abs(moved) > 5e-6).astype(jnp.float32))) > 0.9
