"""Adapters and codes on several devices: the numbers of one device, and nothing large whole on each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.algorithms.sft import SFT
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.lora import LoRA, abstract_adapter, draw_adapter
from rlhf.model.quantised import quantise_base
from rlhf.model.sharding import make_mesh, place, place_rows
from rlhf.train.plan import n_bytes
from rlhf.train.update import initial_state, loss_and_gradient

A = Architecture(
    vocab_size=64, width=128, ff_width=128, layers=2, heads=4, kv_heads=2, head_width=32, query_scale=32**-0.5,
    window=8, pattern=2,
)  # fmt: skip
SETTINGS = SFT(learning_rate=1e-3, batch_size=8, microbatch_size=8)


def components(kind: str | None) -> dict:
    base = jax.device_put(Gemma3(A).initialise(0), may_alias=False)
    base = base if kind is None else quantise_base(base, kind)
    lora = LoRA(rank=8)
    adapter = draw_adapter(jax.random.key(1), A, lora)
    adapter = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    return {"model": base, "adapter": adapter, "adapter_scale": jnp.float32(lora.scale)}


def rows() -> dict:
    tokens = np.random.default_rng(0).integers(1, 64, (8, 16)).astype(np.int32)
    ones, places = np.ones_like(tokens), np.tile(np.arange(16, dtype=np.int32), (8, 1))
    weight = np.full(tokens.shape, 1 / 16, np.float32)
    batch = {"tokens": tokens, "segments": ones, "positions": places, "is_answer": ones > 0, "weight": weight}
    return {**batch, "noise": np.arange(8, dtype=np.uint32)}


@jax.jit
def step(params: dict, batch: dict) -> tuple:
    frozen = {name: x for name, x in params.items() if name != "adapter"} | {"adapter_dropout": jnp.float32(0.1)}
    return loss_and_gradient({"adapter": params["adapter"]}, frozen, batch, SETTINGS, Gemma3(A))


@pytest.mark.parametrize(("kind", "mesh"), [("nf4", (2, 2, 2)), ("int8", (1, 4, 2))], ids=str)
def test_every_mesh_gives_the_numbers_of_one_device(kind, mesh):
    params = components(kind)
    metrics, gradient = step(params, place_rows(rows(), None))
    there = make_mesh(*mesh)
    spread = place(params, there)
    found, found_gradient = step(spread, place_rows(rows(), there))
    assert float(found["loss"]) == pytest.approx(float(metrics["loss"]), abs=1e-5)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=1e-5), found_gradient, gradient)

    for path, x in jax.tree_util.tree_leaves_with_path(spread):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("norm") or x.ndim == 0:
            continue
        n_parts = x.size / x.addressable_shards[0].data.size
        # a scale has no axis of the inputs (int8); of a pair of an adapter one has no axis that is split over tensor
        least = 2 if name.endswith("/scale") else mesh[1] if name.endswith(("/a", "/b")) else mesh[1] * mesh[2]
        assert n_parts >= least, name


@pytest.mark.parametrize("targets", ["qv", "all"])
def test_bytes_of_adapters_on_each_device_fall_as_the_number_of_parts(targets):
    """Of 1B's shapes: no axis of the mesh fails to divide them, and nothing is whole on each device."""
    sizes = Architecture(262_144, 1152, 6912, 26, 4, 1, 256, 256**-0.5, 512)
    whole = {"adapter": abstract_adapter(sizes, LoRA(rank=4, targets=targets))}
    for fsdp in (2, 4, 8):
        assert n_bytes(whole, make_mesh(1, fsdp, 1)) * fsdp == n_bytes(whole)
    tensor_too = n_bytes(whole, make_mesh(1, 4, 2)) * 4 / n_bytes(whole)
    assert 0.5 < tensor_too < 1


def test_the_optimizer_of_an_adapter_is_split_like_it():
    spread = place({"adapter": components(None)["adapter"]}, make_mesh(1, 4, 2))
    state = initial_state(spread, SETTINGS)
    moments = [x for x in jax.tree.leaves(state["optimizer"]) if x.ndim == 3]
    assert len(moments) == 2 * 14
    for x, like in zip(moments, 2 * jax.tree.leaves(spread), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, 3)
        assert not x.sharding.is_fully_replicated
