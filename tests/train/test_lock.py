"""One run to a folder: refused while another process has it, free when that ends in whatever way."""

import os
import signal
import subprocess
import sys

import pytest

from rlhf.errors import ConfigError
from rlhf.train import lock

HOLD = """
import sys
from pathlib import Path
from rlhf.train import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path, command, small):
    """Killed, the first leaves its file behind, and that is no lock."""
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        done = command(f"hydra.run.dir={folder}", *small)
        assert done.code == 1
        assert f"{folder} is in use by process {holder.pid} on {os.uname().nodename}: two runs can't" in done.output
        assert not (folder / "metrics.jsonl").exists()
        holder.send_signal(signal.SIGKILL)
    finally:
        holder.kill()
        holder.communicate()
    assert (folder / lock.NAME).is_file()
    with lock.held(folder):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"), lock.held(folder):
            pass
        assert (folder / lock.NAME).is_file()  # the one that was refused took nothing away
    assert not (folder / lock.NAME).exists()


def test_a_disk_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.held(tmp_path):
        pass
    assert f"{tmp_path} can't be locked" in caplog.text
    assert "nothing keeps another run from writing into it" in caplog.text
