"""A damaged checkpoint is never used in silence: it is named with file and array, and the one before needs consent."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.errors import CheckpointError
from rlhf.train.checkpoint import Checkpoints, load_parameters

N_ARRAYS = 4


def state(seed: int) -> dict:
    values = np.random.default_rng(seed).normal(size=(6, 8))
    return {
        "params": {"w": jnp.asarray(values, jnp.float32), "b": jnp.asarray(values[0], jnp.bfloat16)},
        "optimizer": {"mu": jnp.zeros((6, 8)), "count": jnp.int32(seed)},
    }


def assert_is(tree: dict, seed: int) -> None:
    for found, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(state(seed)), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


@pytest.fixture
def run(tmp_path) -> Checkpoints:
    """Two checkpoints, of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", max_to_keep=3)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"seed": step})
    return checkpoints


def flip(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_of_every_array_is_caught(run):
    files = sorted((run.path(2) / "arrays").glob("*.*/*"))
    assert len(files) == 2 * N_ARRAYS, "a chunk and its description for each array"
    for path in files:
        array = path.parent.name.replace(".", "/")
        n_bits = 8 * path.stat().st_size
        for bit in {0, n_bits // 3, n_bits // 2, n_bits - 1}:
            flip(path, bit)
            with pytest.raises(
                CheckpointError, match=rf"{run.path(2)} is damaged: .*\(array {array}\) .*checksum"
            ) as error:
                run.restore(state(0))
            assert "trainer.allow_older_checkpoint=true goes on from the one before, " + str(run.path(1)) in str(
                error.value
            )
            flip(path, bit)
    assert_is(run.restore(state(0))[0], 2)


def test_every_other_changed_file_is_named(run):
    folder = run.path(2)
    others = [path for path in folder.rglob("*") if path.is_file() and "." not in path.parent.name]
    assert {path.name for path in others} == {"manifest.json", "_METADATA", "_sharding", "process_0"}
    for path in others:
        for bit in (0, 4 * path.stat().st_size):
            flip(path, bit)
            with pytest.raises(CheckpointError, match=f"{folder} is damaged: file .*{path.name} "):
                run.restore(state(0))
            flip(path, bit)


@pytest.mark.parametrize(
    "name", ["arrays/params.w/0.0", "arrays/optimizer.count/.zarray", "arrays/_METADATA", "manifest.json"]
)
def test_missing_and_truncated_files_are_named(run, name):
    path = run.path(2) / name
    data = path.read_bytes()
    for n_bytes in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n_bytes])
        with pytest.raises(CheckpointError, match=f"{run.path(2)} is damaged: file {name} ") as error:
            run.restore(state(0))
        if name != "manifest.json":
            assert f"has {n_bytes} bytes, but {len(data)} were written" in str(error.value)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{run.path(2)} is damaged: file {name} (\(array .*\) )?is missing"):
        run.restore(state(0))


def test_an_array_that_the_store_read_wrongly_is_caught(run, monkeypatch):
    from rlhf.train import manifest

    monkeypatch.setattr(manifest, "check_files", lambda *arguments: None)
    for chunk in ("arrays/params.w/0.0", "arrays/optimizer.mu/0.0"):
        shutil.copy(run.path(1) / chunk, run.path(2) / chunk)  # a sound file, of other values
    with pytest.raises(CheckpointError, match=r"damaged: array params/w is not what was written \(checksum\);"):
        run.restore(state(0))


def test_the_one_before_is_used_with_consent_and_the_damaged_one_set_aside(run, caplog):
    flip(run.path(2) / "arrays" / "params.w" / "0.0", 100)
    with caplog.at_level(logging.WARNING):
        tree, record = run.restore(state(0), allow_older=True)
    assert_is(tree, 1)
    assert (record["step"], record["seed"]) == (1, 1)
    assert f"{run.path(2)} is damaged: file arrays/params.w/0.0 (array params/w)" in caplog.text
    assert f"trying the one before, {run.path(1)}" in caplog.text
    assert run.steps() == [1]
    assert (run.folder / "step_2.damaged" / "manifest.json").is_file()
    run.save(2, state(2), {})
    assert_is(run.restore(state(0))[0], 2)


def test_several_damaged_ones(run):
    run.save(3, state(3), {})
    for step in (2, 3):
        (run.path(step) / "manifest.json").unlink()
    assert_is(run.restore(state(0), allow_older=True)[0], 1)
    assert run.steps() == [1]
    (run.path(1) / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=f"file manifest.json is missing; there is no earlier checkpoint in {run.folder}"
    ):
        run.restore(state(0), allow_older=True)
    assert run.steps() == [1], "without a good one nothing is set aside"


def test_a_damaged_manifest_does_not_hide_the_shapes(run):
    flip(run.path(2) / "manifest.json", 4000)
    target = {"params": state(0)["params"], "optimizer": run.abstract("optimizer")}
    with pytest.raises(CheckpointError, match=r"file manifest\.json .*trainer\.allow_older_checkpoint=true"):
        run.restore(target)
    assert_is(run.restore(target, allow_older=True)[0], 1)
    (run.path(1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"{run.path(1)} is damaged: file manifest.json is missing"):
        run.abstract("optimizer")


def test_a_damaged_later_checkpoint_does_not_push_out_the_good_ones(tmp_path):
    run = Checkpoints(tmp_path / "checkpoints", max_to_keep=1)
    run.save(9, state(9), {})
    run.path(9).rename(run.path(10))
    run.save(5, state(5), {})
    assert run.steps() == [5, 10]
    run.save(6, state(6), {})
    assert run.steps() == [6, 10]


def test_damaged_parameters_name_the_other_checkpoint(run):
    flip(run.path(2) / "arrays" / "params.b" / "0", 77)
    hint = re.escape(f"model.checkpoint={run.path(1)} is another of this run")
    with pytest.raises(CheckpointError, match=rf"{run.path(2)} is damaged: .*\(array params/b\).*; {hint}"):
        load_parameters(run.folder.parent)


# For each line of its input, one child that saves until it is killed; imports are made once, before the fork.
SAVE_FOREVER = """
import os, sys
from pathlib import Path
import jax.numpy as jnp
import orbax.checkpoint
from rlhf.train.checkpoint import Checkpoints

def save_forever():
    run = Checkpoints(Path(sys.argv[1]), max_to_keep=2)
    first = (run.steps() or [0])[-1] + 1
    for step in range(first, first + 10**6):
        tree = {"params": {str(i): jnp.full((64, 64), step * 100.0 + i) for i in range(6)}, "step": jnp.int32(step)}
        run.save(step, tree, {"seed": step})
        print(step, flush=True)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        save_forever()
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path):
    run = Checkpoints(tmp_path / "checkpoints", max_to_keep=2)
    target = {"params": {str(i): jnp.zeros((64, 64)) for i in range(6)}, "step": jnp.int32(0)}
    saved, n_partial = 0, 0
    command = [sys.executable, "-c", SAVE_FOREVER, str(run.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for attempt in range(8):
            process.stdin.write("go\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            first = int(process.stdout.readline())
            time.sleep(0.03 + 0.017 * attempt)
            os.kill(child, signal.SIGKILL)
            printed = [int(line) for line in iter(process.stdout.readline, "dead\n")]
            assert first == saved + 1
            n_partial += any(path.suffix == ".partial" for path in run.folder.iterdir())
            steps = run.steps()
            assert steps[-1] >= max([saved + 1, *printed]), "what save returned for is there"
            assert len(steps) <= 3
            for step in steps:
                tree, record = run.restore(target, step=step)
                assert (int(tree["step"]), record["seed"], record["step"]) == (step, step, step)
                assert all((leaf == step * 100 + int(name)).all() for name, leaf in tree["params"].items())
            saved = steps[-1]
        process.stdin.close()
    assert n_partial > 0, "no kill fell into a save: the test shows nothing"
