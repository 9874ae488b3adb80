"""A run that was stopped, however and wherever, goes on bit for bit: as if nothing had happened."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# a reference that follows the policy is in the checkpoint, beside parameters and optimizer
WORDS = [
    "algorithm=tr_dpo", "algorithm.reference.every=3",
    "model.width=32", "model.ff_width=48", "model.heads=2", "model.kv_heads=1", "model.head_width=16",
    "model.layers=2", "model.pattern=2", "dataset.n_train=60", "dataset.n_eval=16", "trainer.eval_rows=8",
    "evaluation.rows=2", "evaluation.max_new_tokens=4",
    "algorithm.batch_size=8", "algorithm.microbatch_size=4", "algorithm.learning_rate=1e-3",
    "trainer.epochs=null", "trainer.max_steps=20", "trainer.log_every=3", "trainer.eval_every=5",
    "trainer.samples_every=4", "trainer.n_samples=2", "trainer.checkpoint_every=2",
]  # fmt: skip
LAST = 20
# rows of metrics.jsonl: the start, every third step, those with held-out metrics, the last
STEPS = [0, 3, 5, 6, 9, 10, 12, 15, 18, 20]
SAMPLED = [0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start(place: Path, *words: str) -> subprocess.Popen:
    """`rlhf` in a process of its own that can be stopped, with programs compiled once for all of them."""
    command = [sys.executable, "-m", "rlhf", *words, f"hardware.compilation_cache={place / 'compiled'}"]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture
def run(command, place, monkeypatch):
    """`rlhf` in this process, to its end: what it printed."""
    monkeypatch.chdir(place)

    def to_its_end(*words: str) -> str:
        done = command(*words)
        assert done.code == 0, done.output
        return done.output

    return to_its_end


@pytest.fixture
def whole(place, run) -> Path:
    """The folder of a run that nothing interrupted, made once for this module."""
    if not (place / "whole").exists():
        run(*WORDS, "hydra.run.dir=whole")
    return place / "whole"


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


def arrays(folder: Path, step: int = LAST) -> dict[str, bytes]:
    """The bytes of every array of a checkpoint: parameters, optimizer, counters, memory."""
    place = folder / "checkpoints" / f"step_{step}" / "arrays"
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


def test_killed_again_and_again(place, whole, run):
    rng = random.Random(0)
    folder = place / "killed"
    moments = {
        "before its first step": lambda: (folder / "config.json").exists(),
        "while a checkpoint is written": lambda: any(folder.glob("checkpoints/*.partial")),
        "some steps later": lambda: n_rows(folder) >= 5,
        "near the end": lambda: n_rows(folder) >= 8,
    }
    words = [*WORDS, f"hydra.run.dir={folder}", "resume=auto"]
    for moment, is_reached in moments.items():
        process = start(place, *words)
        wait_for(process, is_reached)
        time.sleep(rng.uniform(0, 0.1) if moment == "some steps later" else 0)
        process.kill()
        code, output = finish(process)
        assert code == -signal.SIGKILL, f"ended before it was killed {moment}:\n{output}"
        if moment == "before its first step":
            assert not any(folder.glob("checkpoints/step_*"))
    assert "going on after step" in run(*words)
    assert "starting at step 0" in (folder / "log.txt").read_text()
    assert_same_run(folder, whole)


REWARD = """
import time
from pathlib import Path

def odd(prompts, completions, fields, step):
    if step == 3 and not Path("judging").exists():
        Path("judging").touch()
        time.sleep(5)
    return [float(len(text) % 3 == 0) for text in completions]
"""


def test_killed_while_answers_are_judged(place, run):
    """Dynamic sampling reads prompts ahead of its step: their place is in the checkpoint too."""
    (place / "slow.py").write_text(REWARD)
    words = [
        "algorithm=dapo", "algorithm.group_size=2", "algorithm.minibatches=2", "algorithm.max_new_tokens=8",
        "algorithm.truncation.buffer=2", "reward=python", "reward.python.function=slow.odd", *WORDS[2:],
        "trainer.max_steps=5", "trainer.samples_every=1", "trainer.eval_every=0",
    ]  # fmt: skip
    process = start(place, *words, "hydra.run.dir=judged")
    wait_for(process, (place / "judging").exists)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert "going on after step 2 of" in run(*words, "hydra.run.dir=judged", "resume=auto")
    run(*words, "hydra.run.dir=unjudged")
    found, expected = place / "judged", place / "unjudged"
    assert sum(row.get("groups/attempts", 0) for row in rows(expected)) > 0
    assert without_times(rows(found)) == without_times(rows(expected))
    assert (found / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    assert arrays(found, 5) == arrays(expected, 5)


def without_times(found: list[dict]) -> list[dict]:
    ends = ("/milliseconds", "/compilations")
    return [{k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith(ends)} for row in found]


def test_sigterm_saves_and_says_how_to_go_on(place, whole, run):
    folder = place / "stopped"
    process = start(place, *WORDS, "hydra.run.dir=stopped")
    wait_for(process, lambda: n_rows(folder) >= 4)
    process.terminate()
    code, output = finish(process)
    assert code == 143, output
    assert "SIGTERM: stopping after this step" in output
    (stopped,) = [line for line in output.splitlines() if "checkpoint written; go on with" in line]
    step = int(stopped.partition("stopped after step ")[2].partition(",")[0])
    assert stopped.endswith(f"go on with resume={folder}")
    assert 6 <= step < LAST
    assert (folder / "checkpoints" / f"step_{step}").is_dir()
    # all that the run was started with lies in its folder
    output = run("-cp", "stopped/.hydra", "-cn", "config", f"resume={folder}")
    assert f"going on after step {step} of" in output
    assert_same_run(folder, whole)


@pytest.fixture
def damaged(whole, tmp_path):
    """A finished run whose newest checkpoint has a flipped bit."""
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    file = next((folder / "checkpoints" / f"step_{LAST}" / "arrays" / "params.model.embedding").glob("0*"))
    content = bytearray(file.read_bytes())
    content[1000] ^= 4
    file.write_bytes(content)
    return folder


def test_a_damaged_checkpoint_is_named_and_the_one_before_used_with_consent(command, whole, damaged):
    words = [*WORDS, f"resume={damaged}"]
    refused = command(*words)
    assert refused.code == 1
    newest, before = (damaged / "checkpoints" / f"step_{step}" for step in (LAST, LAST - 2))
    assert f"checkpoint {newest} is damaged" in refused.output
    assert f"trainer.allow_older_checkpoint=true goes on from the one before, {before}" in refused.output
    assert "Traceback" not in refused.output
    done = command(*words, "trainer.allow_older_checkpoint=true")
    assert done.code == 0, done.output
    assert f"going on after step {LAST - 2} of" in done.output
    assert newest.with_suffix(".damaged").is_dir()
    assert_same_run(damaged, whole)


def test_other_data_is_refused(command, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["dataset"]["n_train"] = 61  # as if the same files held other rows
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    done = command(*WORDS, "dataset.n_train=61", f"resume={tmp_path / 'run'}")
    assert done.code == 1
    assert "the data changed since" in done.output
    assert "a run goes on only with the rows it began with" in done.output


def test_a_run_on_several_devices_goes_on_too(command, small, tmp_path):
    mesh = [f"hardware.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    words = [
        *small, *mesh, *WORDS[:2], "model.heads=4", "model.kv_heads=2", "trainer.max_steps=4",
        "trainer.eval_rows=3", "evaluation.rows=0",  # three rows on four parts of the mesh
    ]  # fmt: skip
    whole = command(*words, "hydra.run.dir=whole")
    assert whole.code == 0, whole.output
    first = command(*words, "trainer.checkpoint_every=2", "hydra.run.dir=cut")
    assert first.code == 0, first.output
    assert "devices: 8 of 8 × cpu (cpu) as 2 data × 2 fsdp × 2 tensor" in first.output
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_4")
    again = command(*words, "resume=cut")
    assert again.code == 0, again.output
    assert "going on after step 2 of" in again.output
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    found, expected = (arrays(tmp_path / name, 4) for name in ("cut", "whole"))
    assert any(name.startswith("memory.reference") for name in expected)
    assert found == expected


def test_a_run_that_never_began_is_no_obstacle(command, small, tmp_path):
    words = [*small, "trainer.max_steps=1", "hydra.run.dir=run"]
    failed = command(*words, "dataset.max_length=16")
    assert failed.code == 1
    assert "more than dataset.max_length=16" in failed.output
    assert (tmp_path / "run" / "config.json").exists()
    mended = command(*words, "resume=auto")  # with or without resume
    assert mended.code == 0, mended.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]["max_length"] == 128
    assert command(*words).code == 1
