"""Pipelines: stages that start from each other, each a normal run in a folder of its own."""

import json
import os
import re
import signal

import pytest

from rlhf.train.checkpoint import load_parameters

TWO_STAGES = """
stages:
  sft:
    - algorithm=sft
    - algorithm.learning_rate=1e-2
    - trainer.max_steps=4
    - trainer.checkpoint_every=2
  dpo:
    - algorithm=dpo
    - algorithm.beta=0.2
    - model.checkpoint=${stage:sft}
    - trainer.max_steps=3
report: [nll, rewards/accuracies]
"""


@pytest.fixture
def words(tmp_path, small):
    """Overrides that choose the pipeline of two small stages, in folder `run`."""
    write(tmp_path, TWO_STAGES)
    kept = [word for word in small if not word.startswith(("trainer.max_steps", "evaluation.rows"))]
    return ["--config-dir", "mine", "pipeline=two", *kept, "evaluation.rows=0", "hydra.run.dir=run"]


def write(tmp_path, text: str) -> None:
    (tmp_path / "mine" / "pipeline").mkdir(parents=True, exist_ok=True)
    (tmp_path / "mine" / "pipeline" / "two.yaml").write_text(text)


def metrics(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_same_parameters(one, other) -> None:
    (first, _), (second, _) = load_parameters(one), load_parameters(other)
    flat, same = first["model"].pop("layers"), second["model"].pop("layers")
    for found, expected in ((first["model"], second["model"]), (flat, same)):
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == expected[name].tobytes() for name in found)


def test_stages_are_runs_and_the_later_starts_where_the_earlier_ended(command, words, tmp_path):
    done = command(*words, "seed=3")
    assert done.code == 0, done.output
    sft, dpo = tmp_path / "run" / "sft", tmp_path / "run" / "dpo"
    assert [row["step"] for row in metrics(sft)] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in metrics(dpo)] == [0, 1, 2, 3]
    assert config(sft)["seed"] == config(dpo)["seed"] == 3  # the user's overrides reach all stages
    assert config(dpo)["model"]["checkpoint"] == str(sft)
    assert config(dpo)["algorithm"]["beta"] == 0.2
    for folder in (sft, dpo):
        names = {path.name for path in folder.iterdir()}
        assert {".hydra", "config.json", "log.txt", "metrics.jsonl", "checkpoints"} <= names
    assert re.search(r"self-check: first loss 0\.69314\d, expected 0\.693147: ok", (dpo / "log.txt").read_text())
    assert "step 4/4" in (sft / "log.txt").read_text()
    assert "step 4/4" not in (dpo / "log.txt").read_text()
    table = done.output[done.output.index("stage ") :]
    before, after = metrics(sft)[0]["val/nll"], metrics(sft)[-1]["val/nll"]
    assert f"{before:.3f} → {after:.3f}" in table
    assert after < before
    # what the second stage measures before its first step is the model that the first one ended with
    assert metrics(dpo)[0]["val/rewards/margins"] == 0
    assert str(dpo) in table


def test_a_stage_is_repeated_from_its_stored_config(command, words, tmp_path):
    assert command(*words).code == 0
    again = command("-cp", "run/dpo/.hydra", "-cn", "config", "hydra.run.dir=again")
    assert again.code == 0, again.output
    assert metrics(tmp_path / "again") == metrics(tmp_path / "run" / "dpo")
    assert_same_parameters(tmp_path / "again", tmp_path / "run" / "dpo")
    assert "step 3/3" in (tmp_path / "again" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            ["algorithm.beta=0.2", "algorithm.betta=0.2"],
            ["stage dpo", "algorithm.betta: unknown key; did you mean algorithm.beta"],
        ),
        (["algorithm.beta=0.2", "algorithm.beta=-1"], ["stage dpo", "algorithm.beta=-1 of DPO must be above 0"]),
        (["algorithm=dpo", "algorithm=dop"], ["stage dpo", "there is no such algorithm; did you mean dpo"]),
        (["${stage:sft}", "${stage:stf}"], ["stage dpo refers to ${stage:stf}", "the stages before it are: sft"]),
        (["report:", "reprot:"], ["pipeline.reprot: a pipeline has no such key; did you mean report?"]),
        (["  dpo:", "  algorithm:"], ["pipeline.stages.algorithm: a stage can't have the name of a section"]),
        (["    - algorithm.beta=0.2", "    - seed"], ["pipeline.stages.dpo=", "must be a list of overrides"]),
    ],
    ids=["key", "value", "group", "stage", "section", "name", "word"],
)
def test_a_mistake_in_the_last_stage_ends_it_before_the_first(command, words, tmp_path, changed, expected):
    write(tmp_path, TWO_STAGES.replace(*changed))
    done = command(*words)
    assert done.code == 1
    assert all(part in done.output for part in expected), done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run" / "sft").exists()


def test_resume_skips_what_is_finished_and_goes_on_with_what_is_not(command, words, tmp_path, monkeypatch):
    from rlhf.algorithms.dpo import DPO

    assert command(*words, "hydra.run.dir=whole").code == 0
    prepare = DPO.prepare

    def fails_at_the_third(self, runtime, *arguments):
        if runtime.step == 2:
            raise OSError("the disk is gone")
        return prepare(self, runtime, *arguments)

    every = "trainer.checkpoint_every=1"
    with monkeypatch.context() as patch:
        patch.setattr(DPO, "prepare", fails_at_the_third)
        broken = command(*words, every)
    assert broken.code == 1
    assert "the pipeline failed in stage 2/2 dpo; mended, it goes on with resume=" in broken.output
    assert "OSError: the disk is gone" in (tmp_path / "run" / "dpo" / "log.txt").read_text()
    refused = command(*words, every)
    assert refused.code == 1
    assert "holds a finished stage; resume=auto skips it" in refused.output

    moved = (tmp_path / "run").rename(tmp_path / "nach Süd")  # stages find each other by their names
    first_stage = (moved / "sft" / "log.txt").read_bytes()
    done = command(*words, every, "resume=auto", "hydra.run.dir=nach Süd")
    assert done.code == 0, done.output
    assert "stage 1/2 sft: finished before, skipped" in done.output
    assert "going on after step 2" in (moved / "dpo" / "log.txt").read_text()
    assert (moved / "sft" / "log.txt").read_bytes() == first_stage
    for stage in ("sft", "dpo"):
        assert metrics(moved / stage) == metrics(tmp_path / "whole" / stage)
    assert_same_parameters(moved / "dpo", tmp_path / "whole" / "dpo")


def test_a_stopped_pipeline_says_how_to_go_on(command, words, tmp_path, monkeypatch):
    from rlhf.algorithms.dpo import DPO

    prepare = DPO.prepare

    def stops(self, runtime, *arguments):
        if runtime.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, runtime, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DPO, "prepare", stops)
        stopped = command(*words)
    assert stopped.code == 143
    assert f"the pipeline stopped in stage 2/2 dpo; go on with resume={tmp_path / 'run'}" in stopped.output
    assert not (tmp_path / "run" / "dpo" / "stage.json").exists()
    done = command(*words[:-1], "resume=run")
    assert done.code == 0, done.output
    assert [row["step"] for row in metrics(tmp_path / "run" / "dpo")] == [0, 1, 2, 3]
    assert "going on after step 2" in (tmp_path / "run" / "dpo" / "log.txt").read_text()


def test_another_override_is_refused_on_resume(command, words, tmp_path):
    assert command(*words).code == 0
    other = command(*words, "resume=auto", "seed=1")
    assert other.code == 1
    assert "was made with" in other.output
    assert "seed=1" in other.output
    wrong = command(*words[:-1], "resume=mine")
    assert wrong.code == 1
    assert "resume=mine: this folder has none of the stages sft, dpo" in wrong.output


def test_what_the_user_sets_takes_the_place_of_what_a_stage_sets(command, words, tmp_path):
    alone = ["+dpo.algorithm.beta=0.5", "+dpo.trainer.max_steps=1"]
    done = command(*words, "trainer.max_steps=2", "model.checkpoint=null", *alone)
    assert done.code == 0, done.output
    sft, dpo = config(tmp_path / "run" / "sft"), config(tmp_path / "run" / "dpo")
    assert sft["trainer"]["max_steps"] == 2
    assert dpo["trainer"]["max_steps"] == 1
    assert dpo["algorithm"]["beta"] == 0.5
    assert dpo["model"]["checkpoint"] == str(tmp_path / "run" / "sft")  # what makes it a pipeline stays


def test_debug_reaches_every_stage(command, words, tmp_path):
    done = command(*words, "debug=fast", "trainer.samples_every=0")
    assert done.code == 0, done.output
    assert [metrics(tmp_path / "run" / stage)[-1]["step"] for stage in ("sft", "dpo")] == [2, 2]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("algorithm=ipo", "algorithm=ipo: pipeline stage sft is made for algorithm=sft; +sft.algorithm=ipo"),
        ("+ddpo.seed=1", "+ddpo.seed=1: the pipeline has no stage 'ddpo'; did you mean dpo?"),
        ("algorithm.beta=0.5", "algorithm.beta: unknown key; there are: batch_size,"),
    ],
    ids=["group", "stage", "only one stage has it"],
)  # fmt: skip
def test_mistakes_on_the_command_line(command, words, tmp_path, word, expected):
    done = command(*words, word)
    assert done.code == 1
    assert expected in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run" / "sft").exists()


def test_a_folder_with_signs_that_hydra_reads(command, words, tmp_path):
    done = command(*words[:-1], "trainer.max_steps=1", "hydra.run.dir='a run, of=(two) [stages]'")
    assert done.code == 0, done.output
    assert (tmp_path / "a run, of=(two) [stages]" / "dpo" / "checkpoints" / "step_1").is_dir()


def test_a_sweep_of_pipelines(command, words, tmp_path):
    done = command("-m", *words[:-1], "trainer.max_steps=1", "seed=0,1", "hydra.sweep.dir=sweep")
    assert done.code == 0, done.output
    for number in (0, 1):
        dpo = config(tmp_path / "sweep" / str(number) / "dpo")
        assert dpo["seed"] == number
        assert dpo["model"]["checkpoint"] == str(tmp_path / "sweep" / str(number) / "sft")
    table = (tmp_path / "sweep" / "summary.csv").read_text().splitlines()
    assert len(table) == 3
    assert "dpo/after/rewards/accuracies" in table[0]
