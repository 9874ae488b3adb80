"""The table of a sweep: one row per run with what was swept over and what came out; written after every run."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

from rlhf.report.write import PAGE, try_write_report

log = logging.getLogger(__name__)

_tables: dict[Path, list[dict[str, Any]]] = {}


def record(job: Any, folder: Path, result: dict[str, Any] | None = None, error: BaseException | None = None) -> None:
    """Add a run to the table of its sweep (`job` is Hydra's own config); does nothing for a single run.

    The table lies in the sweep's folder as summary.csv, read back first: launchers may run each job in a process of
    its own. Beside it, report.html shows the runs so far.
    """
    if job.mode.name != "MULTIRUN":
        return
    numbers = {k: v for k, v in (result or {}).items() if isinstance(v, int | float | str)}
    swept = dict(o.lstrip("+").split("=", 1) for o in job.overrides.task if "=" in o)
    sweep_folder = Path(job.sweep.dir).resolve()
    row = {
        "run": _name(folder.resolve(), sweep_folder),
        **{f"{k}=" if k == "run" else k: v for k, v in swept.items()},  # task=report has a setting of that name
        "status": "failed" if error else "ok",
        **numbers,
    }
    if error is not None:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    (folder / "summary.json").write_text(json.dumps(row))
    rows = [json.loads(path.read_text()) for path in sweep_folder.rglob("summary.json")]
    rows.sort(key=lambda r: (len(r["run"]), r["run"]))
    _write(sweep_folder / "summary.csv", rows)
    try_write_report(sweep_folder)
    _tables[sweep_folder] = rows


def _name(folder: Path, sweep_folder: Path) -> str:
    """Of a run: its folder inside that of its sweep."""
    return str(folder.relative_to(sweep_folder)) if folder.is_relative_to(sweep_folder) else str(folder)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_constant(column: str, rows: list[dict[str, Any]]) -> bool:
    """Whether all runs that have it, two at least, have the same."""
    values = [str(row[column]) for row in rows if column in row]
    return len(values) > 1 and len(set(values)) == 1


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def report() -> None:
    """Print the tables of the sweeps that this process ran."""
    from tabulate import tabulate

    for folder, rows in _tables.items():
        shown = [c for c in _columns(rows) if c in ("run", "status", "error") or not _is_constant(c, rows)]
        shown = [c for c in shown if not c.endswith(("_low", "_high"))]  # too wide; they are in the file
        cells = [[row.get(c, "") for c in shown] for row in rows]
        print("\n" + tabulate(cells, shown, floatfmt=".4g", disable_numparse=False))
        n_failed = sum(row["status"] == "failed" for row in rows)
        print(f"\n{len(rows)} runs, {n_failed} failed; table: {folder / 'summary.csv'}")
        if (folder / PAGE).is_file():
            print(f"curves side by side: {folder / PAGE}")
    _tables.clear()
