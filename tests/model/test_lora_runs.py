"""Runs that train an adapter: what their checkpoints hold, how they go on, and what other runs make of them."""

import json
import shutil

import jax
import pytest
from hydra import compose, initialize_config_dir

from rlhf import build
from rlhf.run import CONF
from rlhf.train import guard
from rlhf.train.checkpoint import read_record

OFF = ["evaluation.rows=0", "trainer.eval_rows=4"]
LORA = ["model.lora.rank=2", "model.lora.targets=qv", "algorithm.learning_rate=1e-2"]


@pytest.fixture
def words(command, small, tmp_path):
    """Of a run that starts from the parameters of another, `base`."""
    done = command(*small, *OFF, "algorithm.learning_rate=1e-2", "hydra.run.dir=base")
    assert done.code == 0, done.output
    return [*small, *OFF, "model.checkpoint=base"]


def metrics(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def arrays(folder, step: int) -> dict[str, bytes]:
    place = folder / "checkpoints" / f"step_{step}" / "arrays"
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "_sharding"]
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def succeeds(done) -> str:
    assert done.code == 0, done.output
    return done.output


def test_a_run_resumes_bit_for_bit_and_its_checkpoints_hold_the_adapter_alone(command, words, tmp_path):
    words = [*words, *LORA, "model.lora.dropout=0.2", "trainer.max_steps=4", "trainer.checkpoint_every=2"]
    output = succeeds(command(*words, "hydra.run.dir=whole"))
    assert "adapter: new, rank 2, scale 8, on q v" in output
    # width 32, queries 32, values 16, rank 2, two layers
    assert f"{(32 + 32 + 32 + 16) * 2 * 2:,} trained (0.92%)" in output
    expected = arrays(tmp_path / "whole", 4)
    named = {name.partition("/")[0] for name in expected}
    parts = {f"adapter.layers.{projection}.{which}" for projection in "qv" for which in "ab"}
    assert {name for name in named if name.startswith("params")} == {f"params.{part}" for part in parts}
    moments = {name for name in named if name.startswith("optimizer") and "layers" in name}
    assert len(moments) == 2 * len(parts)
    assert not [name for name in named if "model" in name]

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_4")
    assert "going on after step 2 of" in succeeds(command(*words, "resume=cut"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert arrays(tmp_path / "cut", 4) == expected

    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_4")
    shutil.rmtree(tmp_path / "base")
    again = command(*[w for w in words if not w.startswith("algorithm.learning")], *OFF, "seed=1", "hydra.run.dir=base",
                    "model.checkpoint=null", "model.lora.rank=null", "model.lora.dropout=0")  # fmt: skip
    succeeds(again)
    refused = command(*words, "resume=cut")
    assert refused.code == 1
    assert f"can't go on: the parameters of {tmp_path / 'base'} have changed since" in refused.output
    refused = command(*words, "model.checkpoint=whole", "hydra.run.dir=next")
    assert refused.code == 1
    assert f"trained an adapter on {tmp_path / 'base'}, whose parameters have changed since" in refused.output
    assert (
        f"model.checkpoint=BASE model.adapter={tmp_path / 'whole'} takes the base from another place" in refused.output
    )
    output = succeeds(command(*words, "model.checkpoint=base", "model.adapter=whole", "hydra.run.dir=next"))
    assert f"the adapter of {tmp_path / 'whole'} was trained on other parameters than {tmp_path / 'base'}" in output


def test_preference_training_goes_on_with_an_adapter_and_other_runs_merge_it(command, words, tmp_path):
    succeeds(command(*words, *LORA, "hydra.run.dir=sft"))
    last = metrics(tmp_path / "sft")[-1]["val/loss"]
    output = succeeds(
        command(*words, *LORA, "algorithm=dpo", "model.checkpoint=sft", "model.lora.alpha=16", "hydra.run.dir=dpo")
    )
    assert f"adapter: that of {tmp_path / 'sft'}, rank 2" in output
    assert "self-check: first loss 0.693147, expected 0.693147: ok" in output
    first, *_, end = metrics(tmp_path / "dpo")
    assert first["val/rewards/chosen"] == pytest.approx(0, abs=1e-4)  # the reference is the start, not the bare base
    assert end["val/rewards/margins"] != first["val/rewards/margins"]

    output = succeeds(command(*words, "model.checkpoint=sft", "hydra.run.dir=all"))
    assert f"the adapter of {tmp_path / 'sft'} is merged into its base" in output
    assert "48,480 trained (100%)" in output
    assert metrics(tmp_path / "all")[0]["val/loss"] == pytest.approx(last, abs=1e-5)

    output = succeeds(command(*words, "model.checkpoint=dpo", "model.lora.rank=4", "hydra.run.dir=four"))
    assert f"model.lora is not that of {tmp_path / 'dpo'} (rank 2, scale 8, q,v there; rank 4" in output
    assert "adapter: new, rank 4" in output

    output = succeeds(command(*words, "algorithm=dpo", "model.checkpoint=dpo", "task=evaluate", "hydra.run.dir=e"))
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["rewards/margins"] == pytest.approx(
        end["val/rewards/margins"], abs=1e-5
    )
    record = read_record(tmp_path / "four")
    assert record["started_from"] == str(tmp_path / "dpo")


def test_a_quantised_base_is_merged_as_it_was_trained_on(command, words, tmp_path):
    output = succeeds(command(*words, *LORA, "model.base_quantisation=nf4", "hydra.run.dir=nf4"))
    assert "base: matrices of the layers in nf4" in output
    last = metrics(tmp_path / "nf4")[-1]["val/loss"]
    succeeds(command(*words, "model.checkpoint=nf4", "trainer.max_steps=1", "hydra.run.dir=merged"))
    assert metrics(tmp_path / "merged")[0]["val/loss"] == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize("algorithm", ["kto", "tr_dpo"])
def test_other_algorithms_train_an_adapter_too(command, small, tmp_path, algorithm):
    words = [*small, *OFF, "model.lora.rank=2", "model.lora.dropout=0.1", f"algorithm={algorithm}"]
    succeeds(command(*words, "hydra.run.dir=run"))
    names = arrays(tmp_path / "run", 2)
    assert any(name.startswith("params.adapter") for name in names)
    assert not [name for name in names if "embedding" in name]
    assert any(name.startswith("memory.reference.adapter") for name in names) == (algorithm == "tr_dpo")


def test_a_sweep_over_adapters_has_one_base_and_numbers_do_not_compile_again(command, words, monkeypatch):
    monkeypatch.setattr(build, "_kept", {})
    words = [*words, "model.lora.rank=2", "model.lora.dropout=0.1", "trainer.eval_rows=0"]
    done = command("-m", *words, "model.lora.targets=qv,mlp", "hydra.sweep.dir=sweep")
    assert succeeds(done).count("parameters: run") == 1
    assert "2 runs, 0 failed" in done.output
    words = [*words, "model.lora.targets=mlp", "algorithm.learning_rate=1e-3"]
    with guard.record_compilations() as again:
        succeeds(command(*words, "model.lora.alpha=3", "model.lora.dropout=0.4", "hydra.run.dir=other"))
    assert not [name for name in again.names if "update" in name], again.names


def n_live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def test_there_is_one_copy_of_the_base(small, tmp_path, monkeypatch):
    """Under preference training, whose reference needs it too."""
    monkeypatch.chdir(tmp_path)
    wide = ["algorithm=dpo", "model.width=128", "evaluation.rows=0", "trainer.eval_rows=0"]
    words = [*small, *wide, "hardware.compilation_cache=null", "model.lora.rank=2", "model.lora.targets=qv"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides=words)
    before = n_live_bytes()
    job = build.Experiment(cfg, tmp_path / "run").training_job()
    base, adapter = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (job.frozen["model"], job.trainable))
    assert n_live_bytes() - before < base + 3 * adapter + 10_000
    assert adapter < base / 50
    assert job.runtime.reference.params["model"] is job.frozen["model"]
    assert set(job.runtime.reference.params) == {"model"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.lora.rank=0"], "model.lora.rank=0 of LoRA must be at least 1"),
        (["model.lora.targets=qkv", "model.lora.rank=2"], "model.lora.targets='qkv' of LoRA must be qv, attention,"),
        (["model.base_quantisation=int8"], "model.base_quantisation=int8 needs model.lora.rank"),
        (["model.lora.rank=2", "model.adapter=nowhere"], "model.adapter=nowhere: there is no such folder"),
        (["model.lora.rank=2", "model.adapter=."], "model.adapter=.: expected a folder with adapter_model.safetensors"),
    ],
)  # fmt: skip
def test_mistakes_are_named(command, small, words, message):
    done = command(*small, *OFF, *words)
    assert done.code == 1
    assert message in done.output
    assert "Traceback" not in done.output
