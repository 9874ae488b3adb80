"""The page of a sweep: its runs in one table and on the same axes, and reward against divergence."""

import dataclasses
import math
import os
import shlex
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.report.curves import figure, key, meanings, tail_mean
from rlhf.report.definitions import unit_of
from rlhf.report.folder import RESULT, Run, Status, as_number, pairs_of, runs_in
from rlhf.report.html import MISSING, Html, element, joined, page, section, table
from rlhf.report.judged import with_interval
from rlhf.report.one_run import status_of
from rlhf.report.scale import LONG
from rlhf.report.svg import COLOURS, Line, Spot, line_chart, scatter_chart, sequence_colour

PAGE, SCATTER = "report.html", "reward_kl.svg"

_CURVES = (
    "val/accuracy", "val/reward/mean", "val/rewards/accuracies", "val/loss", "loss", "reward/mean", "kl/k1", "kl/k3",
    "kl", "rewards/accuracies", "rewards/margins", "policy/entropy", "sampling/mean_tokens", "grad_norm",
    "learning_rate",
)  # fmt: skip
_REWARDS = ("val/reward/mean", "reward/mean")  # the first that the runs have
_DIVERGENCES = ("kl/k3", "kl/k1", "kl")
_MOST_COLUMNS = 6  # of metrics in the table
_POINTS = 3000  # of the curves of a chart together


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a sweep. label: what was swept over, in short."""

    run: Run
    result: Mapping[str, Any]
    swept: Mapping[str, str]
    label: str
    colour: str

    @property
    def status(self) -> Status:
        if self.result.get("status") == "ok":
            return Status("finished", "finished")
        error = self.result.get("error")
        return Status("failed", f"failed: {error}") if error else self.run.status


def sweep_page(folder: Path) -> tuple[str, Html | None]:
    """(the page, the chart of reward against divergence where the runs have both)."""
    entries = entries_of(folder)
    scatter = _scatter(entries)
    parts = [
        section("Runs", _table(folder, entries)),
        section("Reward against divergence", *(_frontier(entries, scatter) if scatter else [])),
        section("Curves", _curves(entries)),
    ]
    parts.append(meanings(parts))
    failed = sum(entry.status.kind == "failed" for entry in entries)
    status = Status(
        "failed" if failed else "finished", f"{len(entries)} run{'s' * (len(entries) != 1)}, {failed} failed"
    )
    title = f"Sweep · {folder.resolve().name}"
    return page(title, element("h1", title), status_of(status), _command(entries), *parts), scatter


def entries_of(folder: Path) -> list[Entry]:
    """The runs of a sweep in their order."""
    runs = [Run(path) for path in runs_in(folder)]
    words = [dict(pairs_of(run.overrides)) for run in runs]
    known = [one for one in words if one]  # a run that broke off early may have none
    keys = [key for key in dict.fromkeys(key for one in known for key in one) if len({o.get(key) for o in known}) > 1]
    short, colours = _short_names(keys), _colours([one.get(keys[0]) if len(keys) == 1 else None for one in words])
    entries = []
    for run, one, colour in zip(runs, words, colours, strict=True):
        swept = {key: one.get(key, MISSING) for key in keys}
        label = ", ".join(f"{short[key]}={value}" for key, value in swept.items()) or run.folder.name
        entries.append(Entry(run, run.read_json(RESULT), swept, label, colour))
    return entries


def _colours(swept: Sequence[str | None]) -> list[str]:
    """Colours in order for runs of one number each, else as different as can be."""
    try:
        order = sorted({float(text) for text in swept if text is not None})
    except ValueError:
        order = []
    if len(order) > 1:
        shares = [order.index(float(text)) / (len(order) - 1) if text is not None else None for text in swept]
        return [COLOURS[-3] if share is None else sequence_colour(share) for share in shares]
    n = len(swept)
    return list(COLOURS[:n]) if n <= len(COLOURS) else [sequence_colour(place / (n - 1)) for place in range(n)]


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each name without its group, where that is enough to tell them apart."""
    inner = [key.partition(".")[2] or key for key in keys]
    return {key: name if inner.count(name) == 1 else key for key, name in zip(keys, inner, strict=True)}


def _command(entries: Sequence[Entry]) -> Html | None:
    """The command line, put together from those of the runs."""
    words = [dict(pairs_of(entry.run.overrides)) for entry in entries]
    values = {key: list(dict.fromkeys(one[key] for one in words if key in one)) for one in words for key in one}
    given = [shlex.quote(f"{key}={','.join(found)}") for key, found in values.items()]
    return element("pre", " ".join(["rlhf -m", *given])) if given else None


def _table(folder: Path, entries: Sequence[Entry]) -> Html:
    keys = list(entries[0].swept) if entries else []
    measured = _measured(entries)
    lines = []
    for entry in entries:
        chip = element("i", class_="chip", style=f"color:{entry.colour}")
        name = link(folder, entry.run.folder)
        cells = [_cell(entry.result, metric) for metric in measured]
        lines.append([joined([chip, name]), *entry.swept.values(), entry.status.text, *cells])
    table_ = table(["run", *_short_names(keys).values(), "status", *measured], lines, n_texts=len(keys) + 2)
    more = "before → after, with 95 % intervals where there are any; every number: summary.csv"
    return joined([table_, element("p", more, class_="soft")])


def link(folder: Path, run: Path) -> Html:
    """A run's name, which leads to its own page if it has one."""
    if not (run / PAGE).is_file():
        return element("span", run.name)
    return element("a", run.name, href=urllib.parse.quote(f"{os.path.relpath(run, folder)}/{PAGE}"))


def _measured(entries: Sequence[Entry]) -> list[str]:
    """The metrics of the table: held-out ones that differ between runs or were changed by one, then the loss."""
    names = dict.fromkeys(name for entry in entries for name in entry.result if name.startswith("after/"))
    found = [name.removeprefix("after/") for name in names if not name.endswith(("_low", "_high"))]
    telling = [
        name
        for name in found
        if len({e.result.get(f"{side}/{name}") for e in entries for side in ("before", "after")} - {None}) > 1
    ]
    order = {name.removeprefix("val/"): place for place, name in reversed(list(enumerate(_CURVES)))}
    telling.sort(key=lambda name: order.get(name, len(order)))
    return [*telling[:_MOST_COLUMNS], *(["loss"] if any("loss" in e.result for e in entries) else [])]


def _cell(result: Mapping[str, Any], name: str) -> Html:
    ends = [result.get(f"after/{name}{end}") for end in ("_low", "_high")]
    if f"after/{name}" not in result:
        return with_interval(result.get(name), None, None)
    before, after = with_interval(result.get(f"before/{name}"), None, None), result[f"after/{name}"]
    return joined([before, " → ", with_interval(after, *ends)])


def _curves(entries: Sequence[Entry]) -> Html | None:
    """The main metrics of all runs; the table's marks tell which is which."""
    charts = []
    for name in _CURVES:
        lines = [Line(e.label, points, e.colour) for e in entries if len(points := e.run.points(name)) > 0]
        n_points = max(_POINTS // max(len(lines), 1), 20)
        n_steps = len({step for line in lines for step, value in line.points if math.isfinite(value)})
        if n_steps > 1:
            label = unit_of(name) or name.removeprefix("val/")
            charts.append(figure(name, line_chart(lines, "step", label, min(n_points, 150))))
    if not charts:
        return None
    marks = [key(entry.label, entry.colour) for entry in entries]
    told = f"Curves of {LONG} steps or more are means of the steps around each."
    return joined([element("nav", *marks), element("p", told, class_="soft"), element("div", *charts, class_="charts")])


def _scatter(entries: Sequence[Entry]) -> Html | None:
    spots = frontier(entries)
    if len(spots) < 2:
        return None
    reward, divergence = _axes(entries)
    return scatter_chart(spots, f"{divergence}, {unit_of(divergence)}", reward, is_standalone=True)


def frontier(entries: Sequence[Entry]) -> list[Spot]:
    """Reward and divergence that each run came to: means over the last quarter of its rows (held-out rewards: the last
    one)."""
    reward, divergence = _axes(entries)
    spots = []
    for entry in entries:
        points = [point for point in entry.run.points(reward) if math.isfinite(point[1])]
        y = points[-1][1] if points and reward.startswith("val/") else tail_mean(points)
        x = tail_mean(entry.run.points(divergence))
        if as_number(x) is not None and as_number(y) is not None:
            spots.append(Spot(entry.label, x, y, entry.colour))  # type: ignore[arg-type]  # both are numbers
    return spots


def _axes(entries: Sequence[Entry]) -> tuple[str, str]:
    names = {name for entry in entries for name in entry.run.names}
    return tuple(next((n for n in some if n in names), some[-1]) for some in (_REWARDS, _DIVERGENCES))  # type: ignore[return-value]


def _frontier(entries: Sequence[Entry], chart: Html) -> list[Html]:
    reward, divergence = _axes(entries)
    spots = frontier(entries)
    far = f"{divergence} of a run: mean over the last quarter of its rows"
    told = f"{far}; {reward}: {'the last' if reward.startswith('val/') else 'the same mean'}."
    left = [entry.label for entry in entries if entry.label not in {spot.name for spot in spots}]
    if left:
        told += f" Without a divergence or a reward: {'; '.join(left)}."
    place = element("span", "this chart alone: ", element("a", SCATTER, href=SCATTER), class_="soft")
    return [element("figure", chart), element("p", told, class_="soft"), place]
