"""Bases of 8 and 4 bits: how far from the plain one, how large, and that only adapters get a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from rlhf.errors import ConfigError
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.lora import LoRA, compute_layer, draw_adapter, merged
from rlhf.model.quantised import dequantised, is_quantised, n_bytes, n_parameters, quantise, quantise_base
from rlhf.model.settings import ModelSettings

A = Architecture(
    vocab_size=128, width=128, ff_width=192, layers=2, heads=2, kv_heads=1, head_width=64, query_scale=0.125, window=8,
    pattern=2,
)  # fmt: skip
ERRORS = {"int8": 0.0075, "nf4": 0.092}  # relative, of matrices of normal numbers


@pytest.fixture(scope="module")
def base():
    return jax.device_put(Gemma3(A).initialise(0), may_alias=False)


def copied(base: dict) -> dict:
    return {**base, "layers": dict(base["layers"])}


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantised_base(request, base):
    return request.param, quantise_base(copied(base), request.param)


def test_relative_errors(base, quantised_base):
    kind, codes = quantised_base
    matrices = [name for name, node in codes["layers"].items() if is_quantised(node)]
    assert set(matrices) == {"query", "key_value", "out", "gate_up", "down"}
    for name in matrices:
        weight = base["layers"][name]
        error = float(jnp.linalg.norm(dequantised(codes["layers"][name], "float32") - weight) / jnp.linalg.norm(weight))
        assert error == pytest.approx(ERRORS[kind], rel=0.2), name
    np.testing.assert_array_equal(codes["embedding"], base["embedding"])
    np.testing.assert_array_equal(codes["layers"]["query_norm"], base["layers"]["query_norm"])


def test_codes_mean_what_the_quantiser_says(quantised_base):
    for name in ("key_value", "out"):
        node = quantised_base[1]["layers"][name]
        expected = qwix.dequantize(node.astype(jnp.float32))
        np.testing.assert_array_equal(dequantised(node, "float32"), expected)


def test_bytes(base, quantised_base):
    kind, codes = quantised_base
    matrices = {name: node for name, node in codes["layers"].items() if is_quantised(node)}
    n_weights = n_parameters(matrices)
    assert n_weights == sum(base["layers"][name].size for name in matrices)
    assert n_parameters(codes) == n_parameters(base)
    # int8: a float32 for each output; nf4: a bfloat16 for 64 inputs of an output
    each = {"int8": 1 + 4 / 128, "nf4": 0.5 + 2 / 64}[kind]
    assert n_bytes(matrices) / n_weights == pytest.approx(each, rel=0.01)


def test_tiles_fit_any_width():
    weight = jax.random.normal(jax.random.key(0), (2, 48, 5))
    node = quantise("down", weight, "nf4")
    assert node.scale.shape == (2, 3, 5)
    assert quantise("query_norm", weight, "nf4") is weight


def rows() -> dict:
    tokens = np.random.default_rng(0).integers(1, 128, (2, 16)).astype(np.int32)
    return {
        "tokens": tokens,
        "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(16, dtype=np.int32), (2, 1)),
    }


def test_a_model_of_codes_is_the_model_of_what_they_mean(quantised_base):
    """nf4 in scanned layers, int8 in single ones: what codes mean does not depend on that."""
    lora = LoRA(rank=2)
    # small, so that gates are not saturated: rounding would be all that is left of their slopes
    adapter = jax.tree.map(lambda x: 0.02 + x, draw_adapter(jax.random.key(0), A, lora))
    kind, codes = quantised_base
    model = Gemma3(A, scan_layers=kind == "nf4")
    plain = {**codes, "layers": compute_layer(codes["layers"], "float32")}

    def loss(adapter, base):
        params = {"model": base, "adapter": adapter, "adapter_scale": jnp.float32(lora.scale)}
        return jnp.mean(model.token_logprobs(params, rows()))

    run = jax.jit(jax.value_and_grad(loss))
    (found, found_gradient), (expected, expected_gradient) = run(adapter, codes), run(adapter, plain)
    assert float(found) == pytest.approx(float(expected), abs=1e-5)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=1e-4), found_gradient, expected_gradient)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found_gradient))


def test_merging_makes_plain_what_was_trained_on(quantised_base):
    codes = quantised_base[1]
    nothing = draw_adapter(jax.random.key(0), A, LoRA(rank=2, targets="qv"))
    whole = merged(codes, nothing, 1.0)["layers"]
    for name, node in codes["layers"].items():
        expected = dequantised(node, "float32") if is_quantised(node) else node
        np.testing.assert_allclose(whole[name], expected, rtol=1e-6)


def test_codes_cannot_be_trained():
    sizes = {name: getattr(A, name) for name in ("vocab_size", "width", "ff_width", "layers", "heads", "kv_heads")}
    sizes |= {"head_width": 64, "query_scale": 0.125, "window": 8}
    with pytest.raises(ConfigError, match=r"base_quantisation=nf4 needs model\.lora\.rank: codes can't be trained"):
        ModelSettings(**sizes, base_quantisation="nf4", lora=LoRA())
    assert ModelSettings(**sizes, base_quantisation="nf4", lora=LoRA(rank=2)).trained_lora is not None
    with pytest.raises(ConfigError, match="base_quantisation='int4' of ModelSettings must be one of 'int8', 'nf4'"):
        ModelSettings(**sizes, base_quantisation="int4", lora=LoRA(rank=2))
