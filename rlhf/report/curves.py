"""The metrics of a run as charts, grouped; training and held-out values of a metric in one."""

import html
import math
import re
from collections.abc import Iterable

from rlhf.report.definitions import define, unit_of
from rlhf.report.folder import Run
from rlhf.report.html import Html, anchor, element, folded, joined, number, section, table
from rlhf.report.scale import LONG, Point
from rlhf.report.svg import COLOURS, Line, line_chart

_TIME = "Time and performance"
# the first pattern that a name matches decides; `val/` apart
_GROUPS = (
    (_TIME, r"time/.*|perf/.*|seconds|.*tokens_per_second|n_tokens|.*/milliseconds|sampling/seconds|.*utilisation"),
    ("Loss and optimizer", r"loss.*|nll|grad_norm.*|learning_rate.*|n_skipped|n_updates"),
    ("Held-out answers", r"accuracy|format_accuracy|(pass|maj)@.*|mean_tokens|truncated|n|n_scored"),
    ("Rewards", r"rewards?/.*|advantages/.*|groups/.*|answers/.*|logps/.*|head/.*"),
    ("Divergence from the reference", r"kl|kl/.*"),
    ("Policy", r"policy/.*"),
    ("Values", r"value/.*|returns/.*"),
    ("Generation", r"sampling/.*"),
    ("Other metrics", r".*"),
)
_TITLES = [title for title, _ in _GROUPS[1:]] + [_TIME]


def curves(run: Run) -> Html:
    """A section for each group of metrics."""
    by_group: dict[str, list[str]] = {title: [] for title in _TITLES}
    for name in names_of(run):
        by_group[next(title for title, pattern in _GROUPS if re.fullmatch(pattern, name))].append(name)
    return joined(_group(run, title, found) for title, found in by_group.items())


def names_of(run: Run) -> list[str]:
    """The metrics in the order they come in, those of training and of held-out rows once, without ends of intervals."""
    return list(dict.fromkeys(name.removeprefix("val/") for name in run.names if not _is_bound(name, run.names)))


def _is_bound(name: str, names: Iterable[str]) -> bool:
    """Whether a metric is an end of another's interval."""
    return any(name.endswith(end) and name.removesuffix(end) in names for end in ("_low", "_high"))


def _group(run: Run, title: str, names: list[str]) -> Html | None:
    charts, single = [], []
    for name in names:
        lines = lines_of(run, name)
        values = {value for line in lines for _, value in line.points}
        if len(values) > 1 and any(math.isfinite(value) for value in values):
            charts.append(figure(name, line_chart(lines, "step", unit_of(name) or name), legend(lines)))
        elif values:
            single.append((named(name), unit_of(name), number(values.pop())))
    parts = [element("div", *charts, class_="charts")] if charts else []
    if single:
        unchanged = table(("", "unit", "one value throughout"), single, n_texts=2)
        parts.append(folded(f"{len(single)} that did not change", unchanged, is_open=not charts))
    if title == _TIME and parts:
        return section(title, folded("Charts of times and speed", *parts))
    return section(title, *parts)


def lines_of(run: Run, name: str) -> list[Line]:
    """A metric's curve in training and its held-out one, as far as there are any."""
    lines, points, held_out = [], run.points(name), run.points(f"val/{name}")
    if points:
        lines.append(Line("training", points))
    if held_out:
        lines.append(Line("held out", held_out, COLOURS[1], is_dashed=True, band=_band(run, f"val/{name}")))
    return lines


def _band(run: Run, name: str) -> list[tuple[float, float, float]]:
    high = dict(run.points(f"{name}_high"))
    both = [(step, low, high[step]) for step, low in run.points(f"{name}_low") if step in high]
    return [band for band in both if all(map(math.isfinite, band))]


def figure(name: str, chart: Html, under: Html | None = None) -> Html:
    """A chart under the metric's name, which leads to its definition."""
    return element("figure", element("figcaption", element("b", named(name)), under), chart)


def named(name: str) -> Html:
    """A metric's name, with its formula at a pointer and a link to its definition on the page."""
    told = "; ".join(f"{found.formula} ({found.section})" for found in define(name))
    return element("a", name, href=f"#metric-{anchor(name)}", title=told) if told else element("span", name)


def legend(lines: list[Line]) -> Html:
    keys = [key(line.name, line.colour, line.is_dashed) for line in lines]
    is_long = any(len(line.points) >= LONG and not line.is_dashed for line in lines)
    told = element("span", "bold: mean of the steps around", class_="soft") if is_long else None
    return joined([*keys, told, *_lost(lines)])


def key(name: str, colour: str, is_dashed: bool = False) -> Html:
    """A short line of a colour with what it stands for."""
    mark = element("i", class_="chip dashed" if is_dashed else "chip", style=f"color:{colour}")
    return element("span", mark, name, class_="soft")


def _lost(lines: list[Line]) -> list[Html]:
    n = sum(not math.isfinite(value) for line in lines for _, value in line.points)
    return [element("span", f"× {n} not finite", class_="soft")] if n else []


def meanings(parts: Iterable[Html | None]) -> Html | None:
    """A table of what the metrics are that some parts of a page name."""
    names = {html.unescape(name) for name in re.findall(r'<a href="#metric-[^>]*>([^<]*)</a>', joined(parts))}
    rows = []
    for name in sorted(names):
        for place, found in enumerate(define(name)):
            label = element("span", name, id=f"metric-{anchor(name)}" if place == 0 else None)
            rows.append((label, found.formula, found.unit, found.over, found.section))
    heads = ("metric", "what it is", "unit", "over", "of")
    return section("What the metrics are", folded("Definitions", table(heads, rows, n_texts=5))) if rows else None


def tail_mean(points: list[Point]) -> float | None:
    """Mean of the finite values in the last quarter of a curve: what a noisy metric came to."""
    last = [value for _, value in points[-max(len(points) // 4, 1) :] if math.isfinite(value)]
    return sum(last) / len(last) if last else None
