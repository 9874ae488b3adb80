"""The page of one run."""

from pathlib import Path

from rlhf.report import judged
from rlhf.report.curves import curves, meanings
from rlhf.report.folder import Run, Status
from rlhf.report.html import MISSING, Html, contents, element, folded, joined, page, section
from rlhf.report.samples import samples

_MOST_WARNINGS = 12
_COLOURS = {"finished": "status good", "failed": "status bad"}


def run_page(folder: Path) -> str:
    run = Run(folder)
    parts = [
        judged.held_out(run),
        judged.evaluation(run),
        judged.comparison(run),
        judged.measured_at_end(run),
        curves(run),
        samples(run),
    ]
    parts += [meanings(parts), tail(run)]
    return page(title_of(run), head(run), contents(parts), *parts)


def title_of(run: Run) -> str:
    folder = run.folder.resolve()
    return f"{run.setting('name') or folder.parent.name} · {folder.name}"


def head(run: Run) -> Html:
    """What was run, and how it ended."""
    kept = {name: value for name, value in facts(run).items() if value}
    terms = [element("div", element("dt", name), element("dd", value)) for name, value in kept.items()]
    command = element("pre", run.command) if run.overrides else None
    return joined([element("h1", title_of(run)), status_of(run.status), command, element("dl", *terms)])


def status_of(status: Status) -> Html:
    return element("div", status.text, class_=_COLOURS.get(status.kind, "status"))


def facts(run: Run) -> dict[str, str]:
    """What stands at the top of the page."""
    setting = run.setting
    model, reward = run.told(r"model: ([\d,]+ parameters.*)"), setting("reward")
    algorithm, dataset = (_chosen(run, group) for group in ("algorithm", "dataset"))
    rewards = [name for name in reward if not name.startswith("_")] if isinstance(reward, dict) else []
    return {
        "algorithm": algorithm,
        "dataset": dataset,
        "reward": ", ".join(rewards),
        "model": ", ".join(part for part in (_chosen(run, "model"), model) if part),
        "started from": str(setting("model.checkpoint") or "random parameters"),
        "batches": run.told(r"(\d.* a step.* = .*steps over .*)") or "",
        "devices": run.told(r"devices: (.*)") or "",
        "seed": MISSING if setting("seed") is None else str(setting("seed")),
        "duration": _duration(run.seconds),
    }


def _chosen(run: Run, group: str) -> str:
    """The name of the file chosen of a group, or of the class where that is not known."""
    target = run.setting(f"{group}._target_")
    return run.choices.get(group) or (target.rpartition(".")[2] if isinstance(target, str) else "")


def _duration(seconds: int | None) -> str:
    if seconds is None:
        return ""
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def tail(run: Run) -> Html:
    """The config, the libraries, and what could not be read."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    config = folded("config.yaml", element("pre", run.config_text)) if run.config_text else None
    told = element("p", f"Written by: {versions}" if versions else "No checkpoint, so no versions are recorded.")
    lost = [element("p", problem) for problem in run.problems]
    warnings = [element("p", text) for text in run.warnings[:_MOST_WARNINGS]]
    if n_more := len(run.warnings) - len(warnings):
        warnings.append(element("p", f"{n_more} more are in log.txt.", class_="soft"))
    return joined(
        [
            section("Warnings", *warnings),
            section("What could not be read", *lost),
            section("Config and versions", config, told),
        ]
    )
