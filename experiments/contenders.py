"""Processes of contenders: the same two cores and threads for each, and one interpreter for every peer."""

import os
import subprocess
from pathlib import Path

N_CORES = 2


def environment() -> dict[str, str]:
    """The caller's, with two threads for each library. Byte code may be cached, as it is for any user."""
    two_threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(N_CORES))
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **two_threads, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def interpreter_with(packages: str, interpreters: list[str]) -> str | None:
    """The first of the interpreters that has these packages, which stand apart by blanks."""
    names = packages.split()
    probe = f"import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, {names!r})))"
    return next((python for python in interpreters if subprocess.run([python, "-c", probe]).returncode == 0), None)


def absolute(interpreters: list[str]) -> list[str]:
    """Their paths without following links: a link names its environment."""
    return [str(Path(python).absolute()) for python in interpreters]


def begin(command: list[str], folder: Path) -> subprocess.Popen:
    """The command in this folder, on the first two cores; what it prints is in `stdout`, errors too."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:N_CORES]),
    )
