"""`report.html` in the folder of a run, a sweep or a pipeline."""

import contextlib
import logging
import os
from pathlib import Path

from rlhf import processes
from rlhf.errors import DataError
from rlhf.report.folder import SHOWN, runs_in
from rlhf.report.one_run import run_page
from rlhf.report.pipeline import pipeline_page
from rlhf.report.sweep import PAGE, SCATTER, sweep_page

log = logging.getLogger(__name__)


def write_report(folder: Path) -> Path:
    """Write the page of a folder, over an earlier one; the path of the page. A sweep's scatter lies beside it.

    Raises:
        DataError: the folder holds nothing to report.
    """
    kind = kind_of(folder)
    if kind is None:
        raise DataError(f"{folder} holds no run, sweep or pipeline: none of {', '.join(SHOWN)}, and no folder of a run")
    if kind == "sweep":
        text, scatter = sweep_page(folder)
        if scatter is not None:
            _replace(folder / SCATTER, scatter)
    else:
        text = pipeline_page(folder) if kind == "pipeline" else run_page(folder)
    _replace(folder / PAGE, text)
    return folder / PAGE


def kind_of(folder: Path) -> str | None:
    """`run`, `sweep` or `pipeline`; None for anything else. Both of the latter hold runs, as may a run with numbers of
    its own, whose evaluations someone keeps there."""
    if any((folder / name).is_file() for name in SHOWN):
        return "run"
    if runs_in(folder):
        return "pipeline" if (folder / ".hydra").is_dir() else "sweep"
    return None


def try_write_report(folder: Path) -> None:
    """Write the page if there is something to report. A run never fails over its report: the reason is logged."""
    if not processes.is_first():
        return
    try:
        if kind_of(folder) is not None:
            write_report(folder)
    except Exception as error:
        log.warning("%s was not written: %s: %s", folder / PAGE, type(error).__name__, " ".join(str(error).split()))


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; several jobs of a sweep may do so at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(text.encode("utf-8", errors="replace"))  # half a surrogate pair has no UTF-8
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
