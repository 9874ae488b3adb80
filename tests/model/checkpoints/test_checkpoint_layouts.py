"""Every layout and spelling of the two worlds gives the same parameters, bit for bit, and the reference's logits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import load_reference
from reference_vision import load_jax_form, load_torch_form
from safetensors.numpy import load_file, save_file

from rlhf.model.checkpoints import write_orbax
from rlhf.model.checkpoints.find import find
from rlhf.model.checkpoints.stream import load
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.quantised import quantise_base, quantiser
from rlhf.model.sharding import make_mesh
from rlhf.train.sources import locate

TEXT = Architecture(
    vocab_size=256, width=32, ff_width=64, layers=7, heads=4, kv_heads=1, head_width=16, query_scale=0.25, window=8
)
LAYOUTS = {
    "nested": "Orbax, nested",
    "flat": "Orbax, flat",
    "stacked": "Orbax, stacked",
    "kauldron": "Orbax, state of a trainer",
    "flat_bf16": "Orbax, flat",
    "flat_pytree_noocdbt": "Orbax, flat",
}
logits = jax.jit(Gemma3.logits, static_argnums=0)


def equal(one, other) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), one, other)
    return jax.tree.all(same)


@pytest.fixture(scope="module")
def flat(shared):
    return load(find(shared / "fixtures" / "orbax_tiny_text" / "flat").open(), TEXT, "float32", None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_orbax_layout(shared, flat, layout):
    arrays = find(shared / "fixtures" / "orbax_tiny_text" / layout).open()
    assert arrays.kind == LAYOUTS[layout]
    loaded = load(arrays, TEXT, "bfloat16" if layout == "flat_bf16" else "float32", None)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), flat)
    assert equal(loaded, rounded if layout == "flat_bf16" else flat)


def test_the_policy_of_a_trainers_pair_is_read(tmp_path, flat):
    """A DPO state has the policy and, beside it, the anchor that it began with: the policy is what was trained."""
    import orbax.checkpoint as ocp

    write_orbax.write(flat, TEXT, "float32", tmp_path / "plain")
    handler = ocp.PyTreeCheckpointHandler()
    plain = handler.restore(tmp_path / "plain")
    anchor = jax.tree.map(lambda x: np.zeros_like(np.asarray(x)), plain)
    state = {"step": np.int32(7), "params": {"policy": plain, "anchor": anchor}, "optimizer": {"count": np.int32(7)}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    arrays = find(tmp_path / "state").open()
    assert arrays.kind == "Orbax, state of a trainer, its policy, flat"
    assert equal(load(arrays, TEXT, "float32", None), flat)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_base_is_quantised_while_it_is_read(shared, flat, kind):
    """The same codes as of the whole base; when a leaf comes, the ones before it are codes already."""
    arrays, plain_bytes, codes = find(shared / "fixtures" / "orbax_tiny_text" / "flat").open(), [], quantiser(kind)

    def finish(path, leaf):
        plain_bytes.append(leaf.nbytes)
        return codes(path, leaf)

    found = load(arrays, TEXT, "float32", None, finish)
    copy = jax.tree.map(jnp.copy, flat)
    expected = {**copy, "model": quantise_base(copy["model"], kind)}
    assert equal(found, expected)
    assert len(plain_bytes) == len(jax.tree.leaves(flat))


def test_orbax_gives_the_references_logits(shared, flat):
    expected = np.load(shared / "fixtures" / "orbax_tiny_text" / "expected.npz")
    tokens = jnp.asarray(expected["tokens"])
    segments = (tokens > 0).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    found = logits(Gemma3(TEXT), flat, tokens, segments, positions)
    real = np.asarray(segments, bool)
    np.testing.assert_allclose(np.asarray(found)[real], expected["logits"][real], atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3_tiny_text", "gemma3_tiny_text_rope8"])
def test_safetensors(shared, name):
    folder = shared / "fixtures" / name
    a, params, expected = load_reference(folder)
    loaded = locate(str(folder)).load(a, "float32", None)
    assert equal(loaded, params)
    real = expected["attention_mask"].astype(bool)
    positions = jnp.asarray(np.maximum(np.cumsum(real, axis=1) - 1, 0))
    found = logits(Gemma3(a), loaded, jnp.asarray(expected["input_ids"]), jnp.asarray(real, jnp.int32), positions)
    np.testing.assert_allclose(np.asarray(found)[real], expected["logits"][real], atol=1e-4)


def test_towers(shared):
    a, params, _ = load_torch_form(shared / "fixtures" / "gemma3_tiny_mm")
    assert equal(locate(str(shared / "fixtures" / "gemma3_tiny_mm")).load(a, "float32", None), params)
    a, params, _ = load_jax_form(shared / "fixtures" / "orbax_tiny_mm")
    for layout in ("nested", "flat"):
        folder = shared / "fixtures" / "orbax_tiny_mm" / layout
        assert equal(locate(str(folder)).load(a, "float32", None), params), layout


@pytest.mark.parametrize("layout", ["torch", "jax"])
def test_a_text_model_does_not_read_the_tower(shared, layout, monkeypatch):
    """Counted: what is read of a checkpoint with a tower is exactly the arrays of the text model."""
    is_torch = layout == "torch"
    folder = shared / "fixtures" / ("gemma3_tiny_mm" if is_torch else "orbax_tiny_mm/flat")
    with_tower, params, _ = load_torch_form(folder) if is_torch else load_jax_form(folder.parent)
    a = Architecture(**{**with_tower.__dict__, "vision": None})
    arrays, read = find(folder).open(), []
    whole = arrays.read

    def counted(stored, start, stop):
        part = whole(stored, start, stop)
        read.append((stored.name, part.nbytes))
        return part

    monkeypatch.setattr(arrays, "read", counted)
    loaded = load(arrays, a, "float32", None)
    assert equal(loaded, {"model": params["model"]})
    assert not [name for name, _ in read if "mm_" in name or "vision" in name or "SigLiP" in name]
    assert sum(size for _, size in read) == sum(x.nbytes for x in jax.tree.leaves(loaded))


SPELLINGS = [
    ("language_model.model.", "language_model.", "", "vision_tower."),  # as in the fixture
    ("model.language_model.", "", "model.", "model.vision_tower.vision_model."),
    ("language_model.model.", "language_model.", "", "vision_tower.vision_model."),
    ("model.language_model.model.", "", "model.", "model.vision_tower."),
]


@pytest.mark.parametrize(("text", "head", "projector", "tower"), SPELLINGS)
def test_every_spelling_of_the_names(shared, tmp_path, text, head, projector, tower):
    folder = shared / "fixtures" / "gemma3_tiny_mm"
    a, params, _ = load_torch_form(folder)
    renamed = {}
    for name, x in load_file(folder / "model.safetensors").items():
        name = name.replace("language_model.model.", text).replace("vision_tower.", tower)
        renamed[f"{projector}{name}" if name.startswith("multi_modal") else name] = x
    renamed[f"{head}lm_head.weight"] = renamed[f"{text}embed_tokens.weight"]
    save_file(renamed, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    assert equal(locate(str(tmp_path)).load(a, "float32", None), params)


def test_names_without_anything_in_front_and_the_older_config(shared, tmp_path):
    folder = shared / "fixtures" / "gemma3_tiny_text_rope8"
    a, params, _ = load_reference(folder)
    bare = {name.removeprefix("model."): x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(bare, tmp_path / "anything.safetensors")
    shutil.copy(folder / "config_legacy.json", tmp_path / "config.json")
    assert equal(locate(str(tmp_path)).load(a, "float32", None), params)
    assert equal(locate(str(tmp_path / "anything.safetensors")).load(a, "float32", None), params)


def test_shards_in_bfloat16_with_padding_rows(shared, tmp_path, caplog):
    folder = shared / "fixtures" / "gemma3_tiny_text"
    a, params, _ = load_reference(folder)
    arrays = load_file(folder / "model.safetensors")
    key = "model.embed_tokens.weight"
    arrays[key] = np.concatenate([arrays[key], np.ones((64, a.width), np.float32)])
    arrays = {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}
    names = sorted(arrays)
    place = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({name: arrays[name] for name in names if place[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": a.vocab_size + 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    caplog.set_level("INFO")
    loaded = locate(str(tmp_path)).load(a, "bfloat16", None)
    assert equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert "safetensors, 3 files" in caplog.text
    assert f"the last 64 of {a.vocab_size + 64} rows are padding and left out" in caplog.text


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 8, 1), (1, 1, 4)], ids=str)
def test_every_device_gets_its_part(shared, axes):
    a, params, _ = load_torch_form(shared / "fixtures" / "gemma3_tiny_mm")
    loaded = locate(str(shared / "fixtures" / "gemma3_tiny_mm")).load(a, "float32", make_mesh(*axes))
    assert equal(loaded, params)
    n_parts = axes[1] * axes[2]
    for name in ("query", "gate_up"):
        leaf = loaded["model"]["layers"][name]
        assert leaf.addressable_shards[0].data.nbytes * n_parts == leaf.nbytes


def test_an_embedding_that_does_not_divide_into_pieces(shared, monkeypatch):
    """The last piece overlaps the one before."""
    monkeypatch.setattr("rlhf.model.checkpoints.stream.PIECE_BYTES", 11 * 32 * 4)
    a, params, _ = load_reference(shared / "fixtures" / "gemma3_tiny_text")
    assert a.vocab_size % 11
    assert equal(locate(str(shared / "fixtures" / "gemma3_tiny_text")).load(a, "float32", None), params)
