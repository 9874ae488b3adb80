"""What is wrong with a checkpoint is told in one message that names file and array; nothing is made up in its place."""

import json
import shutil
import weakref

import jax
import numpy as np
import pytest
from reference_models import load_reference
from safetensors.numpy import load_file, save_file
from test_checkpoint_layouts import TEXT

from rlhf.errors import CheckpointError, ConfigError
from rlhf.model.checkpoints import stream
from rlhf.model.checkpoints.find import find
from rlhf.model.gemma3 import Architecture
from rlhf.train.sources import locate


@pytest.fixture
def torch_form(shared, tmp_path):
    """A copy of the fixture to spoil, and its architecture."""
    folder = tmp_path / "model"
    shutil.copytree(shared / "fixtures" / "gemma3_tiny_text", folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder, load_reference(folder)[0]


def refusal(path, a) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(str(path)).load(a, "float32", None)
    return str(caught.value)


def changed(folder, change) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


NORM = "model.layers.3.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop(NORM), "lacks layers.3.self_attn.q_norm.weight of the 93 arrays"),
        (lambda x: x.update({"model.layers.3.bias": np.ones(3)}), "Gemma 3 has not: model.layers.3.bias in "),
        (lambda x: x.update({NORM: np.ones((16, 1), np.float32)}), f"{NORM} in FILE has shape (16, 1); this model"),
        (lambda x: x.update({NORM: np.ones(16, np.int32)}), f"{NORM} in FILE is of type I32"),
        (lambda x: x.update({f"language_{NORM}": np.ones(16), f"model.{NORM}": np.ones(16)}), "are the same array"),
        (lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"] + 1}), "lm_head.weight in FILE differs"),
        (lambda x: x.update({"lm_head.weight": np.ones((5, 32), np.float32)}), "lm_head.weight in FILE has shape (5"),
    ],
)
def test_arrays_that_do_not_fit(torch_form, change, message):
    folder, a = torch_form
    changed(folder, change)
    assert message.replace("FILE", str(folder / "model.safetensors")) in refusal(folder, a)


def test_a_model_of_another_size_is_told_by_its_settings(shared):
    a = Architecture(**{**TEXT.__dict__, "width": 64, "kv_heads": 2, "layers": 8})
    told = refusal(shared / "fixtures" / "orbax_tiny_text" / "stacked", a)
    assert "(Orbax, stacked) is of another model" in told
    assert "model.width=64, but 32 in transformer/" in told
    assert "model.kv_heads=2, but 1 in transformer/stacked_layers/attention_type_" in told
    assert "model.layers=8, but 7 are stored" in told
    assert "model.ff_width" not in told


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("sliding_window", 9, "sliding_window: 9; model.window=8"),
        ("query_pre_attn_scalar", 16, "query_pre_attn_scalar: 16, a scale of 0.25; model.query_scale=0.204124"),
        ("layer_types", ["sliding_attention"] * 7, "global layers: none; model.pattern=6"),
        ("rms_norm_eps", 1e-5, "rms_norm_eps: 1e-05; model.eps=1e-06"),
        ("num_hidden_layers", 6, "num_hidden_layers: 6; model.layers=7"),
        ("vocab_size", 300, "vocab_size: 300; model.vocab_size=288"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping: 30.0; Gemma 3 has None"),
        ("model_type", "gemma2", "model_type is 'gemma2'; this is no Gemma 3"),
        ("rope_parameters", {}, "rope factor"),
    ],
)
@pytest.mark.parametrize("form", ["config.json", "config_legacy.json"])
def test_a_config_that_differs(torch_form, form, key, value, told):
    folder, a = torch_form
    config = json.loads((folder / form).read_text())
    if key == "layer_types" and form != "config.json":
        key, value = "sliding_window_pattern", 8
    if key == "rope_parameters":  # of the newer form, or the older one's three keys
        config |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert told in refusal(folder, a)


def test_every_difference_of_a_config_is_in_one_message(torch_form):
    folder, a = torch_form
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 9, "rms_norm_eps": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    assert refusal(folder, a).count("\n") == 2
    (folder / "config.json").write_text("{")
    assert f"{folder / 'config.json'} can't be read as a Gemma 3 config" in refusal(folder, a)


def test_cut_files(torch_form):
    folder, a = torch_form
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    told = refusal(folder, a)
    assert f"{file} has {len(whole) - 10:,} bytes and should have {len(whole):,}: it is cut" in told
    n_first = 8 + int.from_bytes(whole[:8], "little")  # the arrays begin here
    file.write_bytes(whole[: n_first + 10])
    assert "it is cut, model.embed_tokens.weight is not whole" in refusal(folder, a)
    file.write_bytes(whole + b"more")
    assert f"should have {len(whole):,}: it is damaged" in refusal(folder, a)
    file.write_bytes(b"")
    assert "(0 bytes) is no whole safetensors file: it is empty or cut" in refusal(folder, a)
    file.write_bytes(whole[:300])
    assert "is no whole safetensors file: its header should have" in refusal(folder, a)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "it is a pointer of Git LFS" in refusal(folder, a)
    file.rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names 2 files, of which model-00002-of-00002.safetensors are not there" in refusal(folder, a)


@pytest.mark.parametrize("layout", ["flat", "flat_pytree_noocdbt"])
def test_cut_and_missing_files_of_orbax(shared, tmp_path, layout):
    """A missing chunk would read as zeros."""
    folder = tmp_path / "model"
    shutil.copytree(shared / "fixtures" / "orbax_tiny_text" / layout, folder, copy_function=shutil.copyfile)
    if layout == "flat":
        data = max((folder / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
        data.write_bytes(data.read_bytes()[:1000])
        told = refusal(folder, TEXT)
        assert told.startswith("transformer/")
        assert f" in {folder} can't be read, the file is cut or damaged" in told
    else:
        array = folder / "transformer" / "layer_4" / "attn" / "kv_einsum.w"
        (array / "0.0.0.0").unlink()
        told = refusal(folder, TEXT)
        assert f"transformer/layer_4/attn/kv_einsum/w in {folder} can't be read" in told
        (array / ".zarray").unlink()
        assert "transformer/layer_4/attn/kv_einsum/w" in refusal(folder, TEXT)
    (folder / "_METADATA").write_text("{}")
    assert f"{folder / '_METADATA'} can't be read: it should list the arrays" in refusal(folder, TEXT)


def test_folders_without_one_checkpoint(shared, tmp_path):
    for name, told in [
        ("weights.gguf", "weights.gguf is in llama.cpp's format, which is not read"),
        ("pytorch_model.bin", "in PyTorch's pickles"),
        ("notes.txt", f"no checkpoint in {tmp_path}; it may be a run's folder, an Orbax folder"),
    ]:
        (tmp_path / name).touch()
        assert told in refusal(tmp_path, TEXT)
        (tmp_path / name).unlink()
    for name in ("one", "two"):
        shutil.copytree(shared / "fixtures" / "orbax_tiny_text" / "flat", tmp_path / name)
    assert f"{tmp_path} holds several checkpoints: one, two; name one of them" in refusal(tmp_path, TEXT)
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).touch()
    assert "without their index, model.safetensors.index.json" in refusal(tmp_path, TEXT)
    (tmp_path / "adapter_config.json").touch()
    assert "holds a LoRA adapter, not a model" in refusal(tmp_path, TEXT)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nowhere", "no checkpoint in nowhere, and it is no handle; give a run's folder"),
        (
            "here/nothing",
            "the folder here is here, but no checkpoint in here/nothing; if a download is meant, write hf://",
        ),
        ("google/gemma-3/keras/gemma3-1b", "keras is a form of Kaggle that is not read; choose one of flax"),
        ("s3://bucket/model", "s3:// is not known"),
        ("hf://google/gemma-3/flax/gemma3-1b", "it is no handle"),
    ],
)
def test_texts_that_name_nothing(tmp_path, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match=r"model\.checkpoint=") as caught:
        locate(text)
    assert told in str(caught.value)


def test_at_most_two_pieces_are_in_memory(shared, monkeypatch):
    """Counted over the numpy arrays that reading made and that still live; a leaf never lies on the host as a whole."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 2**13)
    a, params, _ = load_reference(shared / "fixtures" / "gemma3_tiny_text")
    arrays = find(shared / "fixtures" / "gemma3_tiny_text").open()
    alive, most, largest, whole = {}, [0], [0], arrays.read

    def counted(stored, start, stop):
        part = whole(stored, start, stop)
        alive[id(part)] = part.nbytes
        weakref.finalize(part, alive.pop, id(part))
        most[0], largest[0] = max(most[0], sum(alive.values())), max(largest[0], part.nbytes)
        return part

    monkeypatch.setattr(arrays, "read", counted)
    jax.block_until_ready(stream.load(arrays, a, "float32", None))
    assert largest[0] == 2**13  # 64 × 32 numbers
    assert most[0] <= 3 * largest[0]
    assert params["model"]["layers"]["gate_up"].nbytes > 10 * largest[0]
