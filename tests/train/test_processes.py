"""Several processes as one run: they meet, give the numbers of one, only the first writes, none outlives another."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf import processes
from rlhf.errors import ConfigError, TrainingError
from rlhf.processes import Group

QUICK = (
    "model.width=32", "model.ff_width=32", "model.heads=2", "model.kv_heads=1", "model.head_width=16", "model.layers=1",
    "dataset.n_train=48", "dataset.n_eval=8", "trainer.eval_rows=4", "evaluation.rows=2", "evaluation.max_new_tokens=4",
    "algorithm.batch_size=4", "algorithm.microbatch_size=4", "trainer.checkpoint_every=2",
    "hardware.compilation_cache=null", "hardware.platform=cpu", "hardware.compute_dtype=float32",
    "hardware.remat=none", "hardware.mesh.data=2", "hardware.mesh.fsdp=2",
)  # fmt: skip


def free_port() -> int:
    """A port of which the next one is free too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def meet(groups: list[Group], identities: list[dict], port: int) -> list[BaseException | None]:
    """Let all of them meet at once; what each raised."""
    raised: list[BaseException | None] = [None] * len(groups)

    def one(place: int) -> None:
        try:
            groups[place].meet("127.0.0.1", port, identities[place], f"/run/of/{groups[place].number}")
        except Exception as error:
            raised[place] = error

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return raised


@pytest.fixture
def ended(monkeypatch):
    """In place of the end of the process: its message is kept and the thread stops."""
    found: list[int] = []

    def end(code: int):
        found.append(code)
        threading.Event().wait()  # the thread does nothing more

    monkeypatch.setattr(processes, "_exit_now", end)
    return found


def test_all_learn_the_folder_of_the_first(ended):
    groups = [Group(number, 3, 5.0) for number in range(3)]
    assert meet(groups, [{"seed": "0"}] * 3, free_port()) == [None] * 3
    assert [group.folder for group in groups] == ["/run/of/0"] * 3
    for group in groups:
        group.close()


def test_another_config_is_refused_in_both(ended):
    raised = meet([Group(0, 2, 5.0), Group(1, 2, 5.0)], [{"seed": "0"}, {"seed": "1"}], free_port())
    for error in raised:
        assert isinstance(error, ConfigError)
        assert str(error) == "process 1 has another config: seed=0 in process 0, 1 there"


def test_a_number_given_twice_is_refused(ended):
    raised = meet([Group(0, 3, 5.0), Group(1, 3, 5.0), Group(1, 3, 5.0)], [{}] * 3, free_port())
    assert all("a second process came as number 1: each needs its own, from 0 to 2" in str(error) for error in raised)


def test_one_that_does_not_come_is_named(ended):
    (error,) = meet([Group(0, 3, 0.3)], [{}], free_port())
    assert isinstance(error, TrainingError)
    assert str(error) == "1 of 3 processes came within 0.3 s; missing: 1, 2"
    (error,) = meet([Group(1, 3, 0.3)], [{}], free_port())
    assert isinstance(error, TrainingError)
    assert "did not answer within 0.3 s" in str(error)


def test_silence_and_an_end_are_noticed_and_told(ended, caplog):
    silent, other = Group(0, 2, 0.6), Group(1, 2, 60.0)
    assert meet([silent, other], [{}] * 2, free_port()) == [None] * 2
    deadline = time.monotonic() + 10  # number 1 shows life every 10 s only
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended == [1, 1]
    lost = "process 1 has given no sign of life for 0.6 s"
    assert [record.getMessage() for record in caplog.records] == [
        f"{lost}; process {number} ends too, since no run goes on without one of its processes" for number in (0, 1)
    ]
    other.close()
    silent.close()


def test_the_number_comes_from_the_words_or_the_environment(monkeypatch):
    monkeypatch.delenv("RLHF_PROCESS", raising=False)
    assert processes.number_given(["seed=1"]) == 0
    monkeypatch.setenv("RLHF_PROCESS", "2")
    assert processes.number_given(["seed=1"]) == 2
    assert processes.number_given(["hardware.processes.number=3"]) == 3


def test_what_several_processes_cannot_do_is_refused(command, small, monkeypatch):
    several = ("hardware=multihost", "hardware.platform=cpu")
    done = command("task=generate", "prompts=[hello]", *several, *small)
    assert (done.code, "several processes do task=train and task=evaluate, not task=generate" in done.output) == (
        1,
        True,
    )
    done = command(*several, *small)
    assert done.code == 1
    assert "several processes need hardware.processes.number (or RLHF_PROCESS)" in done.output
    monkeypatch.setenv("RLHF_PROCESS", "1")
    done = command("hardware=cpu", *small)
    assert done.code == 1
    assert "this is process 1, but hardware.processes is not set" in done.output


class Pair:
    """`rlhf` in two processes of two simulated devices each, with the run in `folder`; each in a folder of its own."""

    def __init__(self, place: Path, folder: Path, *words: str):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RLHF_")},
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
            "JAX_PLATFORMS": "cpu", "RLHF_COORDINATOR": f"127.0.0.1:{free_port()}", "RLHF_PROCESSES": "2",
        }  # fmt: skip
        command = [sys.executable, "-m", "rlhf", "hardware=multihost", *QUICK, f"hydra.run.dir={folder}", *words]
        self.processes, self.outputs = [], []
        for number in range(2):
            own = place / f"process_{number}"
            own.mkdir(parents=True, exist_ok=True)
            self.outputs.append(place / f"output_{number}.txt")
            with self.outputs[-1].open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=own,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env={**environment, "RLHF_PROCESS": str(number)},
                    )
                )

    def codes(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def output(self, number: int) -> str:
        return self.outputs[number].read_text()


def numbers(folder: Path) -> list[dict]:
    """The rows of a run without its times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "tokens_per_second")
    return [{name: x for name, x in json.loads(line).items() if name not in times} for line in lines]


def without_held_out(row: dict) -> dict:
    return {name: x for name, x in row.items() if not name.startswith("val/")}


def without_times(row: dict) -> dict:
    return {name: x for name, x in row.items() if not name.startswith("time/") and not name.endswith("milliseconds")}


def require_equal(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_and_go_on(tmp_path, command):
    """Four steps with evaluation by generated answers; then from the checkpoint of the second once more."""
    alone, folder = tmp_path / "alone", tmp_path / "run"
    done = command("hardware=auto", *QUICK, "trainer.max_steps=4", f"hydra.run.dir={alone}")
    assert done.code == 0, done.output
    pair = Pair(tmp_path / "first", folder, "trainer.max_steps=4")
    assert pair.codes(240) == [0, 0], pair.output(0) + pair.output(1)
    require_equal(numbers(folder), numbers(alone))
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_2", "step_4"}
    assert not list((tmp_path / "first" / "process_1").iterdir())  # it wrote nothing
    assert " INFO " not in pair.output(1)

    expected = [without_held_out(row) for row in numbers(folder)[1:]]
    for path in sorted((folder / "checkpoints" / "step_4").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "checkpoints" / "step_4").rmdir()
    pair = Pair(
        tmp_path / "second", folder, "trainer.max_steps=4", "resume=auto", "trainer.eval_rows=0", "evaluation.rows=0"
    )
    assert pair.codes(240) == [0, 0], pair.output(0) + pair.output(1)
    assert "going on after step 2" in pair.output(0)
    require_equal([without_held_out(row) for row in numbers(folder)[1:]], expected)

    done = command("hardware=auto", *QUICK, "trainer.max_steps=4", f"resume={folder}")  # one process reads it as well
    assert done.code == 0, done.output


JUDGE = """
def judge(prompts, completions, fields, step):
    with open("judged.txt", "a") as file:
        file.write(f"{step} ")
    return [float(len(text) % 7) for text in completions]
"""


@pytest.mark.slow
def test_two_processes_learn_online_as_one(tmp_path, command):
    """Two steps of GRPO with an adapter: the same answers, rewards and updates; only the first process judges."""
    words = (
        "algorithm=grpo", "algorithm.group_size=2", "algorithm.max_new_tokens=4", "reward=[python,length]",
        "reward.python.function=judging.judge", "model.lora.rank=2", "trainer.max_steps=2", "trainer.samples_every=1",
        "trainer.n_samples=2", "trainer.checkpoint_every=0", "trainer.eval_rows=0", "evaluation.rows=0",
    )  # fmt: skip
    places = [tmp_path, *(tmp_path / "pair" / f"process_{number}" for number in range(2))]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / "judging.py").write_text(JUDGE)
    alone, folder = tmp_path / "alone", tmp_path / "run"
    done = command("hardware=auto", *QUICK, *words, f"hydra.run.dir={alone}")
    assert done.code == 0, done.output
    pair = Pair(tmp_path / "pair", folder, *words)
    assert pair.codes(240) == [0, 0], pair.output(0) + pair.output(1)
    found, expected = ([without_times(row) for row in numbers(one)] for one in (folder, alone))
    require_equal(found, expected)
    assert len(found) == 2
    assert (places[1] / "judged.txt").read_text().split() == (tmp_path / "judged.txt").read_text().split()
    assert {path.name for path in places[2].iterdir()} <= {"judging.py", "__pycache__"}


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_with_a_message(tmp_path):
    folder = tmp_path / "run"
    words = ("trainer.max_steps=100000", "trainer.epochs=null", "trainer.eval_rows=0", "evaluation.rows=0")
    pair = Pair(tmp_path, folder, *words, "trainer.checkpoint_every=0")
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() or (folder / "metrics.jsonl").read_text().count("\n") < 3:
        assert time.monotonic() < deadline, pair.output(0) + pair.output(1)
        time.sleep(0.1)
    pair.processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert pair.codes(20) == [1, -signal.SIGKILL], pair.output(0)
    assert time.monotonic() - killed < 10
    assert "process 1 has ended before the run did; process 0 ends too" in pair.output(0)
    assert "process 1 has ended before the run did" in (folder / "log.txt").read_text()
