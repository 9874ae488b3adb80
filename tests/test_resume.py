"""A run that was stopped, however and wherever, goes on bit for bit: as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORDS = [
    "model.width=32", "model.ff_width=48", "model.heads=2", "model.kv_heads=1", "model.head_width=16",
    "dataset.n_train=60", "dataset.n_eval=16", "trainer.eval_rows=8",
    "evaluation.rows=4", "evaluation.max_new_tokens=4",
    "algorithm.batch_size=8", "algorithm.microbatch_size=4", "algorithm.learning_rate=1e-3",
    "trainer.epochs=null", "trainer.max_steps=20", "trainer.log_every=3", "trainer.eval_every=5",
    "trainer.samples_every=4", "trainer.n_samples=2", "trainer.checkpoint_every=2",
]  # fmt: skip
LAST = 20
# rows of metrics.jsonl: the start, every third step, those with held-out metrics, the last
STEPS = [0, 3, 5, 6, 9, 10, 12, 15, 18, 20]
SAMPLED = [0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20]
CHOICES = {"sft": ["algorithm=sft"], "tr_dpo": ["algorithm=tr_dpo", "algorithm.reference.every=3"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start(place: Path, *words: str) -> subprocess.Popen:
    """`rlhf` in a process of its own, with programs compiled once for all of them."""
    command = [sys.executable, "-m", "rlhf", *words, f"hardware.compilation_cache={place / 'compiled'}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output


def run(place: Path, *words: str) -> str:
    code, output = finish(start(place, *words))
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def whole(place):
    """The folder of a run of each kind that nothing interrupted."""
    runs = [start(place, *WORDS, *words, f"hydra.run.dir={name}") for name, words in CHOICES.items()]
    for code, output in [finish(process) for process in runs]:
        assert code == 0, output
    return place


def wait_for(process: subprocess.Popen, condition) -> None:
    """Until `condition()` holds or the process has ended."""
    end = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def n_rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in found]


def arrays(folder: Path) -> dict[str, bytes]:
    """The bytes of every array of the last checkpoint: parameters, optimizer, counters, memory."""
    place = folder / "checkpoints" / f"step_{LAST}" / "arrays"
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "_sharding"]
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def assert_same_run(folder: Path, whole: Path) -> None:
    assert [row["step"] for row in rows(folder)] == STEPS
    assert rows(folder) == rows(whole)
    assert [row["step"] for row in rows(folder, "samples.jsonl")] == SAMPLED
    assert rows(folder, "samples.jsonl") == rows(whole, "samples.jsonl")
    found, expected = arrays(folder), arrays(whole)
    assert any(name.startswith("params") for name in expected)
    assert any(name.startswith("optimizer") for name in expected)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_killed_again_and_again(whole):
    rng = random.Random(0)
    folder = whole / "killed"
    moments = {
        "before the first checkpoint": lambda: n_rows(folder) >= 1,
        "while a checkpoint is written": lambda: any(folder.glob("checkpoints/*.partial")),
        "some steps later": lambda: n_rows(folder) >= 5,
        "near the end": lambda: n_rows(folder) >= 8,
    }
    words = [*WORDS, *CHOICES["tr_dpo"], f"hydra.run.dir={folder}", "resume=auto"]
    for moment, is_reached in moments.items():
        process = start(whole, *words)
        wait_for(process, is_reached)
        time.sleep(rng.uniform(0, 0.1) if "step" in moment else 0)
        process.kill()
        code, output = finish(process)
        assert code == -signal.SIGKILL, f"ended before it was killed {moment}:\n{output}"
    output = run(whole, *words)
    assert "going on after step" in output
    assert_same_run(folder, whole / "tr_dpo")


def test_killed_before_its_first_step_it_starts_anew(whole):
    folder = whole / "early"
    words = [*WORDS, *CHOICES["sft"], f"hydra.run.dir={folder}", "resume=auto"]
    process = start(whole, *words)
    wait_for(process, lambda: (folder / "config.json").exists())
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert not any(folder.glob("checkpoints/step_*"))
    assert "starting at step 0" in run(whole, *words)
    assert_same_run(folder, whole / "sft")


def test_sigterm_saves_and_says_how_to_go_on(whole):
    process = start(whole, *WORDS, *CHOICES["sft"], "hydra.run.dir=stopped")
    wait_for(process, lambda: n_rows(whole / "stopped") >= 4)
    process.terminate()
    code, output = finish(process)
    assert code == 143, output
    assert "SIGTERM: stopping after this step" in output
    (stopped,) = [line for line in output.splitlines() if "checkpoint written; go on with" in line]
    step = int(stopped.partition("stopped after step ")[2].partition(",")[0])
    assert stopped.endswith(f"go on with resume={whole / 'stopped'}")
    assert 6 <= step < LAST
    assert (whole / "stopped" / "checkpoints" / f"step_{step}").is_dir()
    # all that the run was started with lies in its folder
    output = run(whole, "-cp", "stopped/.hydra", "-cn", "config", f"resume={whole / 'stopped'}")
    assert f"going on after step {step} of" in output
    assert_same_run(whole / "stopped", whole / "sft")


@pytest.fixture
def damaged(whole, tmp_path):
    """A finished run whose newest checkpoint has a flipped bit."""
    folder = tmp_path / "damaged"
    shutil.copytree(whole / "tr_dpo", folder)
    file = next((folder / "checkpoints" / f"step_{LAST}" / "arrays" / "params.model.embedding").glob("0*"))
    content = bytearray(file.read_bytes())
    content[1000] ^= 4
    file.write_bytes(content)
    return folder


def test_a_damaged_checkpoint_is_named_and_the_one_before_used_with_consent(whole, damaged):
    words = [*WORDS, *CHOICES["tr_dpo"], f"resume={damaged}"]
    code, output = finish(start(whole, *words))
    assert code == 1
    newest, before = (damaged / "checkpoints" / f"step_{step}" for step in (LAST, LAST - 2))
    assert f"checkpoint {newest} is damaged" in output
    assert f"trainer.allow_older_checkpoint=true goes on from the one before, {before}" in output
    assert "Traceback" not in output
    output = run(whole, *words, "trainer.allow_older_checkpoint=true")
    assert f"going on after step {LAST - 2} of" in output
    assert newest.with_suffix(".damaged").is_dir()
    assert_same_run(damaged, whole / "tr_dpo")


def test_other_data_is_refused_with_the_run_that_has_it(whole, tmp_path):
    shutil.copytree(whole / "sft", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["dataset"]["n_train"] = 61  # as if the same files held other rows
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    words = [*WORDS, *CHOICES["sft"], "dataset.n_train=61", f"resume={tmp_path / 'run'}"]
    code, output = finish(start(whole, *words))
    assert code == 1
    assert "the data changed since" in output
    assert "a run goes on only with the rows it began with" in output
