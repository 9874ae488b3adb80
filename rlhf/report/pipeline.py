"""The page of a pipeline: each stage with its held-out metrics before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.report.folder import STAGE, Run, Status, runs_in
from rlhf.report.html import MISSING, Html, element, joined, page, section, table
from rlhf.report.judged import with_interval
from rlhf.report.one_run import status_of, tail, title_of
from rlhf.report.sweep import link


def pipeline_page(folder: Path) -> str:
    run = Run(folder)
    stages = stages_of(run)
    results = {name: run.read_json(f"{name}/{STAGE}").get("result") or {} for name in stages}
    measured = run.setting("pipeline.report") or _measured(results)
    lines = []
    for name, result in results.items():
        where = link(folder, folder / name)
        cells = [_change(result, metric) for metric in measured]
        lines.append([where, _state(folder / name).text, *cells])
    stage_table = table(["stage", "", *measured], lines, n_texts=2)
    note = element("p", "Held-out metrics before → after, with 95 % intervals where there are any.", class_="soft")
    title = f"Pipeline · {title_of(run)}"
    top = [element("h1", title), status_of(_whole([_state(folder / name) for name in stages]))]
    command = element("pre", run.command) if run.overrides else None
    return page(title, *top, command, section("Stages", stage_table, note), tail(run))


def _whole(states: Sequence[Status]) -> Status:
    """Finished if all stages are, failed if one is."""
    n_done = sum(state.kind == "finished" for state in states)
    kind = "finished" if n_done == len(states) else "failed" if any(s.kind == "failed" for s in states) else "ended"
    return Status(kind, f"{n_done} of {len(states)} stages finished")


def stages_of(run: Run) -> list[str]:
    """The stages in their order, also those that were not begun."""
    planned = run.setting("pipeline.stages")
    there = [path.name for path in runs_in(run.folder)]
    return list(planned) if isinstance(planned, dict) else there


def _measured(results: dict[str, dict[str, Any]]) -> list[str]:
    names = [name.removeprefix("before/") for result in results.values() for name in result if "before/" in name]
    return list(dict.fromkeys(name for name in names if not name.endswith(("_low", "_high"))))


def _state(folder: Path) -> Status:
    if (folder / STAGE).is_file():
        return Status("finished", "finished")
    return Run(folder).status if (folder / ".hydra").is_dir() else Status("ended", "not begun")


def _change(result: dict[str, Any], name: str) -> Html:
    if f"after/{name}" not in result:
        return element("span", MISSING)
    before, after = (
        with_interval(*(result.get(f"{side}/{name}{end}") for end in ("", "_low", "_high")))
        for side in ("before", "after")
    )
    return joined([before, " → ", after])
