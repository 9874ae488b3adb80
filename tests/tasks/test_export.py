"""From a run to another library's files and back, bit for bit. What those libraries make of them is in tests/peers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf
from reference_models import load_reference
from reference_vision import load_torch_form

from rlhf.errors import CheckpointError, ConfigError
from rlhf.model.checkpoints import write_hf
from rlhf.model.checkpoints.hf_config import require_expressible
from rlhf.model.checkpoints.write_folder import new_folder
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.tokenizer import EMBEDDED, Tokenizer
from rlhf.tasks.export import _checked
from rlhf.train.checkpoint import load_parameters
from rlhf.train.sources import locate

TINY = Architecture(
    vocab_size=1024, width=32, ff_width=48, layers=2, heads=2, kv_heads=1, head_width=16,
    query_scale=0.17677669529663687, window=32, pattern=2,
)  # fmt: skip


def equal(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), one, other))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def run(command, small, runs, *words):
    """The folder of a short run, made once for this module."""
    folder = runs / "_".join(words or ("sft",)).replace("=", "-").replace("/", "-")
    if not folder.exists():
        done = command(*small, "trainer.samples_every=0", "evaluation.rows=0", f"hydra.run.dir={folder}", *words)
        assert done.code == 0, done.output
    return folder


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_there_and_back(command, small, runs, tmp_path, form):
    """The architecture is the run's: the command does not repeat it. What is written is a checkpoint to start from."""
    trained = run(command, small, runs)
    done = command(
        "task=export", f"format={form}", f"model.checkpoint={trained}", "out=there", "task.max_shard_gb=2e-5"
    )
    assert done.code == 0, done.output
    source = locate(str(tmp_path / "there"))
    assert source.tokenizer is not None
    assert source.tokenizer.read_bytes() == EMBEDDED.read_bytes()
    tree, _ = load_parameters(trained)
    assert equal(source.load(TINY, "float32", None), jax.tree.map(np.asarray, tree))
    if form == "hf":
        index = json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) > 2
        sizes = {name: (tmp_path / "there" / name).stat().st_size for name in files}
        assert all(size < 25_000 for size in sizes.values() if size != max(sizes.values()))  # one array is larger
    else:
        assert source.found.open().kind == "Orbax, flat"
    words = ("evaluation.rows=0", "trainer.max_steps=1", "hydra.run.dir=again")
    again = command(*small, f"model.checkpoint={tmp_path / 'there'}", *words)
    assert again.code == 0, again.output
    assert "of the checkpoint" in again.output
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == EMBEDDED.read_bytes()
    assert locate(str(tmp_path / "again")).record["started_from"] == str(tmp_path / "there")


def test_a_foreign_checkpoint_does_not_know_what_it_started_from(command, small, runs, tmp_path):
    trained = run(command, small, runs)
    assert command("task=export", f"model.checkpoint={trained}", "out=there").code == 0
    words = ("task=evaluate", "algorithm=dpo", "evaluation.rows=0", "model.checkpoint=there", "hydra.run.dir=measured")
    done = command(*small, *words)
    assert done.code == 1
    assert "model.checkpoint=there is no run of this library, so what it started from is not known" in done.output
    done = command(*small, *words, "task.reference=there")
    assert done.code == 0, done.output
    measured = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert measured["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert measured["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_bfloat16_is_half_the_size(command, small, runs, tmp_path):
    trained = run(command, small, runs)
    for dtype in ("float32", "bfloat16"):
        done = command("task=export", f"model.checkpoint={trained}", f"out={dtype}", f"task.dtype={dtype}")
        assert done.code == 0, done.output
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("float32", "bfloat16")]
    assert sizes[0] - sizes[1] == pytest.approx(2 * Gemma3(TINY).n_parameters(), abs=64)  # but for the header
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_an_adapter(command, small, runs, tmp_path, form):
    """Alone for peft; merged into its base for the others."""
    trained = run(command, small, runs, "model.lora.rank=2", "model.lora.targets=qv")
    done = command("task=export", f"format={form}", f"model.checkpoint={trained}", "out=there")
    assert done.code == 0, done.output
    written = {path.name for path in (tmp_path / "there").iterdir()}
    if form == "peft":
        from rlhf.model.peft import read_peft

        assert written == {"adapter_config.json", "adapter_model.safetensors"}
        lora, adapter = read_peft(tmp_path / "there", TINY)
        assert (lora.rank, lora.projections) == (2, ("q", "v"))
        tree, _ = load_parameters(trained)
        assert equal(adapter, jax.tree.map(np.asarray, tree["adapter"]))
    else:
        merged = locate(str(trained)).load(TINY, "float32", None)
        assert equal(locate(str(tmp_path / "there")).load(TINY, "float32", None), merged)


def test_nothing_is_overwritten(command, small, runs, tmp_path):
    trained = run(command, small, runs)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    done = command("task=export", f"model.checkpoint={trained}", "out=there")
    assert done.code == 1
    assert "out=there holds something already; nothing is overwritten or deleted" in done.output
    assert (tmp_path / "there" / "mine").read_text() == "mine"
    for words, told in [
        (["model.checkpoint=null"], "task=export needs model.checkpoint=…"),
        ([f"model.checkpoint={trained}", "format=peft"], "has no adapter"),
        ([f"model.checkpoint={trained}", "task.max_shard_gb=0"], "max_shard_gb"),
    ]:
        done = command("task=export", "out=other", *words)
        assert done.code == 1
        assert told in done.output
    assert not (tmp_path / "other").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise OSError("full")

    with pytest.raises(CheckpointError, match="could not be written: full"):
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_stored_config_builds_no_foreign_class():
    stored = {"_target_": "rlhf.model.settings.ModelSettings", "vision": {"_target_": "os.system", "command": "x"}}
    with pytest.raises(ConfigError, match=r"builds its model by os\.system, which is none of"):
        _checked(stored)
    assert _checked({**stored, "vision": None}) == OmegaConf.create({**stored, "vision": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_scale": 0.19}, r"model.query_scale=0.19 would need 27.7008; format=orbax has no such limit"),
        ({"width": 33}, "no model.width=33 that is no multiple of model.heads=2"),
    ],
    ids=str,
)
def test_what_transformers_has_no_words_for_is_not_written(change, message):
    with pytest.raises(ConfigError, match=message):
        require_expressible(dataclasses.replace(TINY, **change))


@pytest.mark.parametrize("name", ["gemma3_tiny_text_rope8", "gemma3_tiny_mm"])
def test_the_fixtures_come_back(shared, tmp_path, name):
    """With their configs, which hold everything that the arrays do not show; images need some rows more."""
    a, params, _ = (load_torch_form if name.endswith("mm") else load_reference)(shared / "fixtures" / name)
    write_hf.write(params, a, "float32", Tokenizer(), tmp_path, 10**9)
    assert equal(locate(str(tmp_path)).load(a, "float32", None), params)
    theirs = json.loads((shared / "fixtures" / name / "config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    for config, text in ((theirs, theirs.get("text_config", theirs)), (ours, ours.get("text_config", ours))):
        config.update(text_config=None)
        text.pop("vocab_size")
    same = {"rope_parameters", "layer_types", "sliding_window", "query_pre_attn_scalar", "head_dim", "model_type"}
    assert {key: ours.get(key) for key in same} == {key: theirs.get(key) for key in same}
    if a.vision is not None:
        assert {key: ours["vision_config"][key] for key in theirs["vision_config"] if key != "attention_dropout"} == {
            key: value for key, value in theirs["vision_config"].items() if key != "attention_dropout"
        }
