"""Adapters: what they compute, how they begin, what they cost, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.algorithms.reference import without_adapter
from rlhf.algorithms.sft import SFT
from rlhf.errors import ConfigError
from rlhf.model import lora as lora_module
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.lora import PROJECTIONS, LoRA, adapter_shapes, draw_adapter, merged
from rlhf.train.update import loss_and_gradient

A = Architecture(
    vocab_size=64, width=32, ff_width=48, layers=3, heads=4, kv_heads=2, head_width=8, query_scale=8**-0.5, window=5,
    pattern=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return jax.device_put(Gemma3(A).initialise(0), may_alias=False)


def random_adapter(lora: LoRA) -> dict:
    """One whose B is not zero."""
    adapter = draw_adapter(jax.random.key(1), A, lora)
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.3, adapter)


def components(base: dict, lora: LoRA) -> dict:
    return {"model": base, "adapter": random_adapter(lora), "adapter_scale": jnp.float32(lora.scale)}


def batch(n_rows: int = 4, time: int = 12) -> dict:
    tokens = np.random.default_rng(0).integers(1, 64, (n_rows, time)).astype(np.int32)
    places = np.tile(np.arange(time, dtype=np.int32), (n_rows, 1))
    ones = np.ones((n_rows, time), np.int32)
    weight = np.full((n_rows, time), 1 / time, np.float32)
    rows = np.arange(n_rows, dtype=np.int32)
    parts = {"tokens": tokens, "segments": ones, "positions": places, "is_answer": ones > 0, "weight": weight}
    return {name: jnp.asarray(x) for name, x in {**parts, "row": rows}.items()}


logprobs = jax.jit(lambda model, params, batch: model.token_logprobs(params, batch), static_argnums=0)


def test_a_new_adapter_changes_nothing_and_one_that_is_off_is_the_base(base):
    lora = LoRA(rank=4)
    new = {"model": base, "adapter": draw_adapter(jax.random.key(0), A, lora), "adapter_scale": jnp.float32(4.0)}
    plain = logprobs(Gemma3(A), {"model": base}, batch())
    np.testing.assert_allclose(
        logprobs(Gemma3(A), new, batch()), plain, atol=5e-6
    )  # another program, so other rounding
    bare = without_adapter({**components(base, lora), "noise": jnp.zeros(1), "adapter_dropout": jnp.float32(0.5)})
    assert bare.keys() == {"model"}
    assert bare["model"] is base
    np.testing.assert_array_equal(logprobs(Gemma3(A), bare, batch()), plain)


def squared(model: Gemma3, params: dict):
    return jnp.sum(model.token_logprobs(params, batch()) ** 2)


@pytest.fixture(scope="module")
def of_merged(base):
    """Components with an adapter on every projection; value and gradient by it of the merged matrices."""
    params = components(base, LoRA(rank=3, alpha=5.0))
    merge = lambda adapter: {"model": merged(base, adapter, params["adapter_scale"])}  # noqa: E731
    return params, *jax.jit(jax.value_and_grad(lambda adapter: squared(Gemma3(A), merge(adapter))))(params["adapter"])


@pytest.mark.parametrize("form", [{}, {"remat": "block"}, {"scan_layers": False}], ids=str)
def test_values_and_gradients_are_those_of_the_merged_matrices(base, of_merged, form):
    params, expected, expected_gradient = of_merged
    plain = jnp.sum(logprobs(Gemma3(A), {"model": base}, batch()) ** 2)
    assert abs(float(plain) - float(expected)) > 1
    loss = lambda adapter: squared(Gemma3(A, **form), params | {"adapter": adapter})  # noqa: E731
    found, gradient = jax.jit(jax.value_and_grad(loss))(params["adapter"])
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for path, array in jax.tree_util.tree_leaves_with_path(gradient):
        wanted = expected_gradient["layers"][path[1].key][path[2].key]
        assert float(jnp.linalg.norm(array - wanted)) < 1e-4 * float(jnp.linalg.norm(wanted)), path


def test_only_some_of_a_fused_matrix_may_have_an_adapter(base):
    for targets in (["v", "up"], ["k", "o", "gate"]):
        params = components(base, LoRA(rank=2, targets=targets))
        plain = {"model": merged(base, params["adapter"], params["adapter_scale"])}
        found, expected = (logprobs(Gemma3(A), p, batch()) for p in (params, plain))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_merging_by_hand(base):
    adapter = random_adapter(LoRA(rank=2, targets=["v", "down"]))
    layers = merged(base, adapter, 0.5)["layers"]
    v, down = (adapter["layers"][name] for name in ("v", "down"))
    values = np.asarray(base["layers"]["key_value"])[1, :, 1] + 0.5 * (v["a"][1] @ v["b"][1]).reshape(32, 2, 8)
    np.testing.assert_allclose(layers["key_value"][1, :, 1], values, atol=1e-6)
    np.testing.assert_array_equal(layers["key_value"][:, :, 0], base["layers"]["key_value"][:, :, 0])
    np.testing.assert_allclose(
        layers["down"][2], np.asarray(base["layers"]["down"])[2] + 0.5 * down["a"][2] @ down["b"][2], atol=1e-6
    )
    np.testing.assert_array_equal(layers["query"], base["layers"]["query"])


def test_the_start_is_that_of_peft():
    """Kaiming-uniform with slope sqrt(5): bound sqrt(2 / (1 + 5)) · sqrt(3 / inputs) = 1 / sqrt(inputs)."""
    adapter = draw_adapter(jax.random.key(0), dataclasses.replace(A, width=400), LoRA(rank=64))["layers"]
    a = np.asarray(adapter["q"]["a"])
    bound = np.sqrt(2 / 6) * np.sqrt(3 / 400)
    assert bound == pytest.approx(0.05)
    assert 0.99 * bound < np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    assert not any(np.asarray(x["b"]).any() for x in adapter.values())
    assert not np.allclose(a[0], a[1])


def test_sets_shapes_and_scales():
    assert LoRA(rank=8, targets="qv").projections == ("q", "v")
    assert LoRA(rank=8, targets="attention").projections == ("q", "k", "v", "o")
    assert LoRA(rank=8, targets="all").projections == PROJECTIONS
    shapes = adapter_shapes(A, LoRA(rank=8, targets=["o", "gate"]))["layers"]
    assert shapes == {"o": {"a": (3, 32, 8), "b": (3, 8, 32)}, "gate": {"a": (3, 32, 8), "b": (3, 8, 48)}}
    assert LoRA(rank=64, alpha=64.0).scale == 1.0
    assert LoRA(rank=16, alpha=8.0).scale == 0.5
    assert LoRA(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0
    assert LoRA(rank=16, alpha=8.0).is_like(LoRA(rank=16, alpha=2.0, rank_stabilised=True, dropout=0.1))
    assert not LoRA(rank=16, targets="qv").is_like(LoRA(rank=16))
    assert not LoRA(rank=16).is_like(LoRA())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 of LoRA must be at least 1"),
        ({"rank": 8, "alpha": 0.0}, "alpha=0.0 of LoRA must be above 0"),
        ({"rank": 8, "dropout": 1.0}, "dropout=1.0 of LoRA must be at least 0 and at most 0.99"),
        (
            {"rank": 8, "targets": "everything"},
            "targets='everything' of LoRA must be qv, attention, mlp, all or a list",
        ),
        ({"rank": 8, "targets": ["q", "gat"]}, "targets of LoRA has 'gat', known are .* did you mean gate"),
        ({"rank": 8, "targets": []}, r"targets=\[\] of LoRA must name one projection or more"),
        ({"rank": 8, "targets": ["q", "q"]}, "each once"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)


def test_dropout_depends_on_the_rows_noise_alone(base):
    lora = LoRA(rank=4)
    params = components(base, lora) | {"adapter_dropout": jnp.float32(0.5)}
    rows = batch()

    def run(noise, params=params):
        return np.asarray(logprobs(Gemma3(A), params | {"noise": jnp.asarray(noise, jnp.uint32)}, rows))

    off = np.asarray(logprobs(Gemma3(A), params, rows))
    first = run([1, 2, 3, 4])
    np.testing.assert_array_equal(run([1, 2, 3, 4]), first)
    other = run([1, 2, 9, 4])
    assert [bool(np.any(a != b)) for a, b in zip(first, other, strict=True)] == [False, False, True, False]
    assert np.abs(first - off).max() > 1e-2
    same_tokens = {name: x[:1].repeat(4, 0) for name, x in rows.items()}
    two_each = params | {"noise": jnp.asarray([7, 8], jnp.uint32)}
    assert len(np.unique(np.asarray(logprobs(Gemma3(A), two_each, same_tokens)).round(4), axis=0)) == 4


def test_dropout_zeroes_the_share_it_says_and_keeps_the_mean():
    layer = {"noise": jax.random.split(jax.random.key(0), 2), "adapter_dropout": jnp.float32(0.25)}
    dropped = np.asarray(lora_module._dropped(layer, jnp.ones((2, 100, 50)), 0))
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean() == pytest.approx(1.0, abs=0.02)
    assert len(np.unique(dropped)) == 2


def test_microbatches_do_not_change_the_gradient_and_the_base_gets_none(base):
    params = components(base, LoRA(rank=4))
    frozen = {"model": base, "adapter_scale": params["adapter_scale"], "adapter_dropout": jnp.float32(0.3)}
    rows = batch() | {"noise": jnp.asarray([1, 2, 3, 4], jnp.uint32)}
    run = jax.jit(lambda a: loss_and_gradient({"adapter": params["adapter"]}, frozen, rows, a, Gemma3(A)))
    (_, whole), (_, cut) = (run(SFT(learning_rate=1e-3, batch_size=4, microbatch_size=size)) for size in (4, 2))
    assert set(whole) == {"adapter"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), whole, cut)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(whole))


def test_an_adapted_product_is_kept_once_for_the_backward_pass():
    """The sum of x · W and the low-rank term is kept, not both: else all adapters would take half as much again."""
    a = dataclasses.replace(A, width=32, ff_width=512, layers=8)
    rows = batch(n_rows=8, time=64)

    def temporary_bytes(targets):
        lora = LoRA(rank=2, targets=targets)
        shapes = lora_module.abstract_adapter(a, lora)
        loss = lambda adapter, base: jnp.sum(  # noqa: E731
            Gemma3(a).token_logprobs({"model": base, "adapter": adapter, "adapter_scale": jnp.float32(1)}, rows)
        )
        compiled = jax.jit(jax.grad(loss)).lower(shapes, Gemma3(a).abstract()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kept = 8 * 8 * 64 * (2 * 512 + 4 * 32) * 4  # layers · tokens · (gate, up and the others) · bytes
    assert temporary_bytes("all") - temporary_bytes("qv") < 0.4 * kept
