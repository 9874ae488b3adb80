"""Adapters of the peft library: the same logits, the same files, and a clear word about what can't be read."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import load_reference
from safetensors.numpy import load_file, save_file

from rlhf.errors import CheckpointError
from rlhf.model.gemma3 import Gemma3
from rlhf.model.lora import merged
from rlhf.model.peft import CONFIG, WEIGHTS, read_peft, tensor_name, to_peft

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "peft"
NAMES = ["all", "query_value_stabilised"]


@pytest.fixture(scope="module")
def reference(shared):
    return load_reference(shared / "fixtures" / "gemma3_tiny_text")


@pytest.fixture(scope="module")
def logits(reference):
    """Of the fixture's tokens, at every eighth place."""
    a, _, expected = reference
    is_real = expected["attention_mask"].astype(bool)
    positions = np.maximum(np.cumsum(is_real, axis=1) - 1, 0).astype(np.int32)
    inputs = (jnp.asarray(x, jnp.int32) for x in (expected["input_ids"], is_real, positions))
    tokens, segments, positions = inputs
    run = jax.jit(Gemma3(a).logits)
    return lambda params: np.asarray(run(params, tokens, segments, positions))[:, ::8], is_real[:, ::8]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(reference, logits, name):
    a, params, _ = reference
    run, is_real = logits
    lora, adapter = read_peft(FOLDER / name, a)
    expected = np.load(FOLDER / name / "expected.npz")["logits"][is_real]
    found = run({**params, "adapter": adapter, "adapter_scale": jnp.float32(lora.scale)})[is_real]
    assert np.abs(run(params)[is_real] - expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if name == "all":
        whole = {"model": merged(params["model"], adapter, lora.scale)}
        np.testing.assert_allclose(run(whole)[is_real], expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_out_again_is_byte_for_byte_what_came_in(reference, name):
    lora, adapter = read_peft(FOLDER / name, reference[0])
    tensors, config = to_peft(adapter, lora)
    expected, settings = load_file(FOLDER / name / WEIGHTS), json.loads((FOLDER / name / CONFIG).read_text())
    assert {k: x.tobytes() for k, x in tensors.items()} == {k: x.tobytes() for k, x in expected.items()}
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "modules_to_save", "fan_in_fan_out"):
        assert config[key] == settings[key], key
    assert set(config["target_modules"]) == set(settings["target_modules"])


def test_settings_are_those_of_the_files(reference):
    lora, _ = read_peft(FOLDER / "query_value_stabilised", reference[0])
    assert (lora.rank, lora.scale, lora.projections) == (4, 1.0, ("q", "v"))


@pytest.fixture
def copy(tmp_path):
    """A copy of an adapter with changed settings or tensors."""
    shutil.copytree(FOLDER / "all", tmp_path / "adapter")

    def change(settings=(), drop=(), add=(), keep_vision_prefix=""):
        folder = tmp_path / "adapter"
        config = json.loads((folder / CONFIG).read_text()) | dict(settings)
        (folder / CONFIG).write_text(json.dumps(config))
        tensors = {k: x for k, x in load_file(folder / WEIGHTS).items() if k not in drop} | dict(add)
        prefix = "base_model.model.model."
        tensors = {k.replace(prefix, prefix + keep_vision_prefix): x for k, x in tensors.items()}
        save_file(tensors, folder / WEIGHTS)
        return folder

    return change


def test_names_of_a_model_with_vision_are_read_too(reference, copy):
    a = reference[0]
    plain, other = read_peft(FOLDER / "all", a)[1], read_peft(copy(keep_vision_prefix="language_model."), a)[1]
    jax.tree.map(np.testing.assert_array_equal, plain, other)


Q = tensor_name(2, "q", "a")
TOWER = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": [Q]}, f"lacks {Q}"),
        ({"add": {Q: np.zeros((3, 32), np.float32)}}, rf"{Q} is \[3, 32\], but rank 2 here needs \[2, 32\]"),
        ({"add": {TOWER: np.zeros((2, 2), np.float32)}}, f"{TOWER} is of the vision tower"),
        ({"add": {"x.lora_magnitude_vector": np.zeros(2, np.float32)}}, "is no low-rank pair of a projection"),
        (
            {"add": {tensor_name(9, "q", "a"): np.zeros((2, 32), np.float32)}},
            "is of a layer that this model of 7 lacks",
        ),
        ({"settings": {"modules_to_save": ["lm_head"]}}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"settings": {"alpha_pattern": {"q_proj": 4}}}, "alpha_pattern=.* is not supported"),
        ({"settings": {"rank_pattern": {"q_proj": 4}}}, "rank_pattern=.* is not supported"),
        ({"settings": {"use_dora": True}}, "use_dora=True is not supported, only use_dora=False"),
        ({"settings": {"peft_type": "IA3"}}, "peft_type='IA3' is not supported"),
        ({"settings": {"kasa_config": {"beta": 1}}}, "kasa_config is given"),
        ({"settings": {"init_lora_weights": "pissa_niter_4"}}, "init_lora_weights='pissa_niter_4' also changed"),
        ({"settings": {"r": None}}, "is no configuration of a peft adapter"),
    ],
)
def test_what_cannot_be_read_is_named(reference, copy, changes, message):
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        read_peft(copy(**changes), reference[0])


def test_missing_and_cut_files_are_named(reference, tmp_path):
    with pytest.raises(CheckpointError, match=f"no adapter in {tmp_path}: {CONFIG} and {WEIGHTS} are expected"):
        read_peft(tmp_path, reference[0])
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((FOLDER / "all" / name).read_bytes())
    (tmp_path / WEIGHTS).write_bytes((FOLDER / "all" / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} can't be read"):
        read_peft(tmp_path, reference[0])
