"""Meshes of simulated devices: the numbers of one device, shares of the memory, and keys that reach JAX."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.algorithms.sft import SFT
from rlhf.errors import ConfigError
from rlhf.model.checkpoints.names import leaf_shapes, nested
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.head import draw_head, raw_output
from rlhf.model.lora import LoRA, draw_adapter
from rlhf.model.settings import ModelSettings
from rlhf.model.sharding import RULES, make_mesh, place, place_rows, shardings
from rlhf.model.vision import Vision
from rlhf.train.drawn import Drawn
from rlhf.train.guard import record_compilations
from rlhf.train.hardware import Hardware, Mesh, Processes
from rlhf.train.update import initial_state, update

VISION = Vision(image_size=16, patch=4, width=16, ff_width=16, layers=1, heads=2, tokens_per_image=4)
A = Architecture(
    vocab_size=64, width=32, ff_width=32, layers=2, heads=8, kv_heads=2, head_width=8, query_scale=8**-0.5, window=8,
    pattern=2, vision=VISION,
)  # fmt: skip
MODEL = Gemma3(A)
SHAPES = [(1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 2, 2)]


def rows() -> dict:
    """Text, with images of one soft-token block in half of the rows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 64, (8, 12)).astype(np.int32)
    soft_tokens = np.zeros_like(tokens)
    soft_tokens[::2, 2:6] = np.arange(1, 5)
    images = rng.integers(0, 256, (8, 1, 16, 16, 3), dtype=np.uint8)
    places = np.tile(np.arange(12, dtype=np.int32), (8, 1))
    return {
        "tokens": tokens, "segments": np.ones_like(tokens), "positions": places, "soft_tokens": soft_tokens,
        "images": images,
    }  # fmt: skip


def all_parameters() -> dict:
    """Every kind at once: the text model, the vision tower, an adapter that does something, and a head."""
    lora = LoRA(rank=8, targets="qv")
    adapter = draw_adapter(jax.random.key(1), A, lora)
    adapter = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    drawn = Drawn(0).load(A, "float32", None)
    return {**drawn, "adapter": adapter, "adapter_scale": jnp.float32(lora.scale), "head": draw_head(0, A.width)}


@jax.jit
@jax.value_and_grad
def loss_and_gradient(params: dict, batch: dict) -> jax.Array:
    hidden = MODEL.hidden_of(params, batch)
    logprobs = jax.nn.log_softmax(MODEL.unembed(params, hidden[:, :-1]))
    scored = jnp.take_along_axis(logprobs, batch["tokens"][:, 1:, None], axis=-1)
    return -jnp.mean(scored) + jnp.mean((raw_output(params["head"], hidden) - 1) ** 2)


@pytest.fixture(scope="module")
def on_one_device():
    params = all_parameters()
    return params, loss_and_gradient(params, rows())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(on_one_device, shape):
    """Of text, images, adapter and head."""
    params, (expected_loss, expected) = on_one_device
    mesh = make_mesh(*shape)
    loss, gradient = loss_and_gradient(place(params, mesh), place_rows(rows(), mesh))
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected["adapter"])) > 0
    jax.tree.map(lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=1e-5), gradient, expected)


def test_the_documentation_has_the_table_of_rules():
    text = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text()
    for name, rule in RULES.items():
        (line,) = [line for line in text.splitlines() if line.startswith("| `") and f"`{name}`" in line.split("|")[1]]
        axes = (" and ".join(axis) if isinstance(axis, tuple) else axis or "–" for axis in rule)
        assert line.split("|")[2].strip() == ", ".join(axes), name


def bytes_on_each(tree: dict, mesh) -> int:
    """Bytes of a tree of shapes on one device."""
    of = shardings(tree, mesh)
    sizes = jax.tree.map(lambda x, where: np.prod(where.shard_shape(x.shape)) * x.dtype.itemsize, tree, of)
    return int(sum(jax.tree.leaves(sizes)))


@pytest.mark.parametrize("size", ["gemma3_1b", "gemma3_4b"])
def test_bytes_on_each_device_fall_as_the_number_of_parts(size):
    """Of all parameters of the real sizes; what is whole on each, such as norms, is under two hundredths."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from rlhf.run import CONF

    with initialize_config_dir(CONF, version_base="1.3"):
        settings: ModelSettings = instantiate(compose("config", [f"model={size}"]).model, _convert_="all")
    a = settings.architecture()
    whole = nested({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in leaf_shapes(a).items()})
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole))
    for fsdp in (2, 4, 8):
        share = bytes_on_each(whole, make_mesh(1, fsdp, 1)) * fsdp / total
        assert 1 <= share <= 1.02, (size, fsdp, share)


def test_the_compiled_update_keeps_every_array_where_it_was():
    """The state comes back split as the rules say, so the second step is the program of the first."""
    mesh = make_mesh(2, 2, 2)
    settings = SFT(learning_rate=1e-3, batch_size=8, microbatch_size=8)
    settings = jax.tree.map(lambda x: jnp.float32(x) if isinstance(x, int | float) else x, settings)
    drawn = place(Drawn(0).load(A, "float32", None), mesh)
    state = initial_state({"model": drawn["model"]}, settings)
    batch = rows()
    batch |= {"is_answer": batch["segments"] > 0, "weight": batch["segments"] / np.float32(12)}
    frozen, batch = {"vision": drawn["vision"]}, place_rows(batch, mesh)
    state, _ = update(state, frozen, batch, settings, jnp.int32(2), model=MODEL, mesh=mesh)
    with record_compilations() as second:
        state, _ = update(state, frozen, batch, settings, jnp.int32(2), model=MODEL, mesh=mesh)
    assert len(second) == 0, second
    assert int(state["n_updates"]) == 2
    for (path, x), where in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings(state, mesh)), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert x.sharding.is_equivalent_to(where, x.ndim), name
        if x.ndim > 1 and not name.endswith("norm"):
            assert x.sharding.shard_shape(x.shape) != x.shape, f"{name} is whole on every device"


REACHES_JAX = """
import os, sys
from rlhf.train import hardware
hardware._runs_on_cpu = lambda platform: False
chosen = hardware.Hardware(visible_devices=(1, 3), memory_fraction=0.5)
chosen._choose_devices()
import jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert xla_bridge.CUDA_VISIBLE_DEVICES.value == "1,3"
from jaxlib import xla_client
assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.5
assert os.environ["TPU_VISIBLE_CHIPS"] == "1,3"
chosen._choose_devices()
try:
    hardware.Hardware(memory_fraction=0.6)._choose_devices()
except hardware.ConfigError as error:
    print(error)
"""


def test_devices_and_memory_are_chosen_before_jax_starts_them():
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"}
    done = subprocess.run([sys.executable, "-c", REACHES_JAX], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "(None, 0.6) here, but this process began with ((1, 3), 0.5)" in done.stdout


def test_what_a_cpu_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"visible_devices=\[0\]: a CPU has no devices to choose from"):
        Hardware(platform="cpu", visible_devices=(0,))._choose_devices()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visible_devices": (0, 0)}, r"visible_devices=\[0, 0\] must be numbers of devices, each once"),
        ({"visible_devices": ()}, r"visible_devices=\[\] must be"),
        ({"memory_fraction": 1.5}, "memory_fraction=1.5 of Hardware must be at most 1 and above 0"),
    ],
    ids=str,
)
def test_impossible_choices_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Hardware(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 2, "number": 2}, "number=2 of Processes must be at least 0 and at most 1"),
        ({"count": 2, "coordinator": "machine"}, "coordinator='machine' of Processes must be HOST:PORT"),
        ({"count": 2, "timeout_seconds": 1}, "timeout_seconds=1 of Processes must be at least 3"),
    ],
    ids=str,
)
def test_impossible_processes_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Processes(**settings)


def test_a_mesh_must_use_every_device_of_several_processes():
    chosen = Hardware(mesh=Mesh(data=2), processes=Processes(count=2))
    with pytest.raises(ConfigError, match="needs 2 devices; the 1 processes have 8, and all must be used"):
        chosen._require_all_devices()
