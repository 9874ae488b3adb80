"""Freed memory between optimizer steps and what happens in between."""

import platform
from pathlib import Path

import pytest

from rlhf.train import processor


def resident() -> int:
    """Bytes of this process that are in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep no memory")
def test_freed_memory_goes_back_where_it_is_much(monkeypatch):
    monkeypatch.setattr(processor, "_MUCH", 2**20)
    monkeypatch.setattr(processor, "_is_kept", True)
    blocks = [b"x" * (100_000 + i) for i in range(600)]
    last = b"x" * 100_000  # behind them, so that nothing goes back by itself
    before = resident()
    del blocks
    with processor.in_between(False):
        pass
    kept = resident()
    with processor.in_between():
        pass
    assert before - kept < 10e6
    assert kept - resident() > 40e6
    assert len(last) == 100_000


def test_around_other_work_and_not_around_steps(monkeypatch):
    calls = []
    monkeypatch.setattr(processor, "_give_back", lambda: calls.append("given back"))
    with processor.in_between(False):
        calls.append("a step")
    with processor.in_between():
        calls.append("answers")
    assert calls == ["a step", "given back", "answers", "given back"]
