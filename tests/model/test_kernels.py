"""Kernels of accelerators against the attention that runs everywhere; where the device is missing, interpreted, or the
same call by XLA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import CASES, WINDOW, assert_same, run, segments_of

from rlhf.errors import ConfigError
from rlhf.model import attention, kernels
from rlhf.model.attention import Places, plain
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.sharding import make_mesh
from rlhf.train.hardware import Hardware

A = Architecture(
    vocab_size=64, width=16, ff_width=16, layers=2, heads=4, kv_heads=2, head_width=8, query_scale=8**-0.5,
    window=WINDOW, pattern=2,
)  # fmt: skip


def long_rows() -> Places:
    """Two rows of two blocks of 128: packed, with padding on either side, segments longer than a block."""
    each = [segments_of(100, 60, -40), segments_of(-20, 170, 10)]
    segments, positions = (jnp.asarray(np.stack(x)) for x in zip(*each, strict=True))
    return Places(positions, segments)


def random_arrays(rows: int, time: int) -> list[jax.Array]:
    """Queries, keys, values and weights of the result."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, time, n, 8)), jnp.float32) for n in (4, 2, 2, 4)]


def require_equal(mix, places: Places, kinds: tuple[bool, ...] = (False, True)) -> None:
    """A kernel and `plain`: results and gradients at the tokens that are no padding, of local and global layers."""
    arrays = random_arrays(*places.positions.shape)
    is_real = (places.segments > 0)[:, :, None, None]
    reference = plain(places, WINDOW)
    for is_global in kinds:
        found = jax.jit(lambda *x, g=is_global: run(mix, x, g, is_real))(*arrays)
        assert_same(found, jax.jit(lambda *x, g=is_global: run(reference, x, g, is_real))(*arrays))


def test_splash_interpreted_equals_the_reference():
    places = long_rows()
    require_equal(kernels.splash(places, WINDOW, block=128), places)


def test_splash_spread_over_devices_equals_the_reference():
    """Rows over data and fsdp, heads over tensor."""
    places = CASES["packed"]
    require_equal(kernels.mixer("splash", places, WINDOW, make_mesh(2, 2, 2)), places, kinds=(False,))


def test_what_cannot_be_divided_every_device_does_whole(monkeypatch):
    """Four rows over eight devices, two heads of keys over four."""
    monkeypatch.setattr(kernels, "splash", plain)
    for shape in ((4, 2, 1), (1, 2, 4)):
        require_equal(kernels.mixer("splash", CASES["packed"], WINDOW, make_mesh(*shape)), CASES["packed"])


@pytest.mark.parametrize("case", CASES)
def test_the_call_of_cudnn_means_the_reference(case):
    """The same arguments of `dot_product_attention`, by XLA."""
    require_equal(kernels.cudnn(CASES[case], WINDOW, "xla"), CASES[case])


def test_cudnn_gets_the_window_and_a_mask_it_can_add(monkeypatch):
    """Lowered for a GPU: both calls are causal, add a mask, and have a window in local layers."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    places = CASES["packed"]
    arrays = [x.astype(jnp.bfloat16) for x in random_arrays(*places.positions.shape)]

    def text(is_global: bool) -> str:
        mix = kernels.cudnn(places, WINDOW)
        traced = jax.jit(jax.grad(lambda *x: jnp.sum(mix(*x, is_global)).astype(jnp.float32))).trace(*arrays[:3])
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    for is_global, window in ((False, WINDOW), (True, 0)):
        found = text(is_global)
        assert "__cudnn$fmhaScaleBiasSoftmax" in found
        assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in found
        told = found.replace("\\22", '"')
        assert set(re.findall(r'"sliding_window_length": (\d+)', told)) == {str(window)}
        assert set(re.findall(r'"mask_type": "(\w+)"', told)) == {"CAUSAL"}


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU with cuDNN")
@pytest.mark.parametrize("case", CASES)
def test_cudnn_equals_the_reference(case):
    places, arrays = CASES[case], [x.astype(jnp.bfloat16) for x in random_arrays(*CASES[case].positions.shape)]
    is_real = (places.segments > 0)[:, :, None, None]
    for is_global in (False, True):
        found, expected = (
            jax.jit(lambda *x, m=mix, g=is_global: run(m, x, g, is_real))(*arrays)
            for mix in (kernels.cudnn(places, WINDOW), plain(places, WINDOW))
        )
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=0.05, atol=0.05)


def test_a_model_with_splash_has_the_gradients_of_one_without():
    """Scanned, so that the kind of a layer is data, in two layers of which one is global."""
    segments, positions = (np.stack([x, x]) for x in segments_of(20, 12, -8))
    tokens = np.random.default_rng(0).integers(1, 64, segments.shape).astype(np.int32)
    params = {"model": Gemma3(A).initialise(0)}
    batch = {"tokens": tokens, "segments": segments, "positions": positions}

    def total(model: Gemma3):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.token_logprobs(p, batch))))(params)

    (found, gradient), (expected, expected_gradient) = total(Gemma3(A, attention="splash")), total(Gemma3(A))
    assert float(found) == pytest.approx(float(expected), abs=1e-4)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=2e-5), gradient, expected_gradient)


def test_what_splash_cannot_mask_runs_by_xla_and_is_said_once(caplog, monkeypatch):
    kernels._say_once.cache_clear()
    reference = plain(CASES["packed"], WINDOW)
    monkeypatch.setattr(attention, "mixer", lambda places, window: reference)
    for case in 2 * ("joint", "images"):
        assert kernels.mixer("splash", CASES[case], WINDOW) is reference
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        "rows with a shared beginning (dataset.share_prompt=false avoids it) run as hardware.attention=xla",
        "rows with images run as hardware.attention=xla",
    ]


@pytest.mark.parametrize(("kind", "device"), [("cudnn", "GPU"), ("splash", "TPU")])
def test_a_kernel_of_another_device_is_refused(kind, device):
    hardware = Hardware(platform="cpu", attention=kind)
    for build in (hardware.start, lambda: hardware.model(A, None)):
        with pytest.raises(ConfigError, match=f"attention={kind} is a kernel for a {device}, but JAX runs on cpu here"):
            build()


class Device:
    """What `require` asks of a GPU."""

    platform, device_kind = "gpu", "RTX 4090"

    def __init__(self, capability: str):
        self.compute_capability = capability


def test_what_cudnn_cannot_compute_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device("8.9")])
    with pytest.raises(ConfigError, match=r"computes in bfloat16 only, hardware.compute_dtype is float32"):
        kernels.require("cudnn", "float32", 128)
    with pytest.raises(ConfigError, match=r"at most 128 on RTX 4090, model.head_width is 256: choose"):
        kernels.require("cudnn", "bfloat16", 256)
    kernels.require("cudnn", "bfloat16", 128)
    monkeypatch.setattr(jax, "devices", lambda: [Device("9.0")])
    kernels.require("cudnn", "bfloat16", 256)
