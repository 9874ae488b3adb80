"""Charts as inline SVG: lines, points with names, bars. Text and axes take the colour of the page's text."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from rlhf.report.html import Html, element, joined, number
from rlhf.report.scale import Axis, Point, axis_of, smoothed, thinned

WIDTH, HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 10, 16, 38
_FONT = 12
_CHARACTER = 6.6  # width of one, about
_FEW = 40  # of so few points, each is marked

COLOURS = (
    "#2f78d0", "#e07b26", "#2a9d62", "#c8453b", "#8c62c4", "#9a6a4f", "#d264a6", "#7c8794", "#a8a51f", "#1fa6b8",
)  # fmt: skip
_SEQUENCE = ((68, 1, 120), (59, 82, 139), (33, 144, 140), (93, 180, 80), (222, 190, 30))  # dark violet to yellow


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. band: (x, low, high) of an interval around it. is_dashed: as held-out values are drawn."""

    name: str
    points: Sequence[Point]
    colour: str = COLOURS[0]
    is_dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclasses.dataclass(frozen=True)
class Spot:
    """A named point."""

    name: str
    x: float
    y: float
    colour: str = COLOURS[0]


def sequence_colour(share: float) -> str:
    """A colour for a place between 0 and 1: of numbers in order."""
    place = min(max(share, 0.0), 1.0) * (len(_SEQUENCE) - 1)
    left = min(int(place), len(_SEQUENCE) - 2)
    mixed = (round(a + (b - a) * (place - left)) for a, b in zip(_SEQUENCE[left], _SEQUENCE[left + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, n_points: int = 150) -> Html:
    """Curves over a common x, in steps. Values that are not finite are left out of the line and marked at the top.

    n_points: that a curve is drawn with at most.
    """
    finite = [[point for point in line.points if math.isfinite(point[1])] for line in lines]
    ends = [value for line in lines for _, low, high in line.band for value in (low, high)]
    x = axis_of([x for line in lines for x, _ in line.points], is_whole=True, margin=0.02)
    y = axis_of([y for points in finite for _, y in points] + ends, may_be_log=not ends)
    drawn = []
    for line, points in zip(lines, finite, strict=True):
        parts = [_band(line, x, y), *_curve(line, points, x, y, n_points, len(lines) > 3), *_lost(line, x)]
        drawn.append(element("g", element("title", line.name), *parts, stroke=line.colour, fill=line.colour))
    return _frame(x, y, x_label, f"{y_label}{' (log scale)' if y.is_log else ''}", drawn)


def scatter_chart(spots: Sequence[Spot], x_label: str, y_label: str, is_standalone: bool = False) -> Html:
    """Points with their names, which are left out where there is no room for them."""
    x = axis_of([spot.x for spot in spots], margin=0.1)
    y = axis_of([spot.y for spot in spots], margin=0.1)
    places = [(_x(x, spot.x), _y(y, spot.y)) for spot in spots]
    taken = [(left - 5, top - 5, left + 5, top + 5) for left, top in places]
    drawn = []
    for spot, (left, top) in zip(spots, places, strict=True):
        told = element("title", f"{spot.name}: {number(spot.x)}, {number(spot.y)}")
        drawn.append(element("circle", told, cx=_r(left), cy=_r(top), r=4.5, fill=spot.colour))
        if room := _room(spot.name, left, top, taken):
            taken.append(room)
            place, align = (room[0], "start") if room[0] > left else (room[2], "end")
            drawn.append(_text(spot.name, place, room[3] - 3, align, size=11))
    return _frame(x, y, x_label, y_label, drawn, is_standalone)


def bar_chart(edges: Sequence[float], counts: Sequence[float], x_label: str, y_label: str) -> Html:
    """A histogram; a vertical line stands at 0 where the axis has it."""
    x, most = Axis(edges[0], edges[-1]), max([*counts, 1])
    y = Axis(0, most * 1.05, is_whole=True)
    bars = []
    for start, end, n in zip(edges, edges[1:], counts, strict=False):
        left, right, top = _x(x, start), _x(x, end), _y(y, n)
        told = element("title", f"{number(float(start))} to {number(float(end))}: {number(n)}")
        size = {"width": _r(max(right - left - 1, 0.5)), "height": _r(_y(y, 0) - top)}
        bars.append(element("rect", told, x=_r(left), y=_r(top), fill=COLOURS[0], **size))
    if x.low < 0 < x.high:
        bars.append(_rule(f"M{_r(_x(x, 0))} {_TOP}V{HEIGHT - _BOTTOM}", stroke_dasharray="4 3", stroke_opacity=0.7))
    return _frame(x, y, x_label, y_label, bars)


def calibration_chart(points: Sequence[tuple[float, float, int]], x_label: str, y_label: str) -> Html:
    """(confidence, accuracy, n) against the line where they are equal; larger circles stand for more pairs."""
    x, y = Axis(0.45, 1.02), Axis(min([0.45, *(accuracy - 0.05 for _, accuracy, _ in points)]), 1.05)
    drawn = [_path([(0.5, 0.5), (1, 1)], x, y, stroke="currentColor", stroke_dasharray="4 3", stroke_opacity=0.7)]
    most = max([n for _, _, n in points] or [1])
    for confidence, accuracy, n in points:
        told = element("title", f"{n} pairs: confidence {number(confidence)}, accuracy {number(accuracy)}")
        place = {"cx": _r(_x(x, confidence)), "cy": _r(_y(y, accuracy)), "r": _r(3 + 7 * math.sqrt(n / most))}
        drawn.append(element("circle", told, fill=COLOURS[0], fill_opacity=0.7, **place))
    return _frame(x, y, x_label, y_label, drawn)


def _curve(line: Line, points: Sequence[Point], x: Axis, y: Axis, n_points: int, is_crowded: bool) -> list[Html]:
    """The curve; of a long one in training its running mean, thin behind it (if there is room) what was measured."""
    if not points:
        return []
    means = [] if line.is_dashed else smoothed(points, y.is_log)
    dash = "5 3" if line.is_dashed else None
    thick = {"stroke_width": 1.8, "stroke_linejoin": "round", "stroke_dasharray": dash}
    shown = thinned(points, n_points)
    if means:
        faint = [] if is_crowded else [_path(shown, x, y, stroke_width=0.8, stroke_opacity=0.35)]
        return [*faint, _path(thinned(means, n_points // 2), x, y, **thick)]
    marks = []
    if len(points) <= _FEW:
        radius = 3 if line.is_dashed or len(points) == 1 else 2
        marks = [element("circle", cx=_r(_x(x, px)), cy=_r(_y(y, py)), r=radius, stroke="none") for px, py in points]
    return [_path(shown, x, y, **thick), *marks]


def _path(points: Sequence[Point], x: Axis, y: Axis, **attributes: object) -> Html:
    places = [(round(10 * _x(x, px)), round(10 * _y(y, py))) for px, py in points]
    steps = [(there[0] - here[0], there[1] - here[1]) for here, there in itertools.pairwise(places)]
    d = f"M{places[0][0] / 10:g} {places[0][1] / 10:g}" + "".join(f"l{dx / 10:g} {dy / 10:g}" for dx, dy in steps)
    return element("path", d=d, fill="none", **attributes)


def _band(line: Line, x: Axis, y: Axis) -> Html | None:
    if len(line.band) < 2:
        return None
    there = [f"{_r(_x(x, px))} {_r(_y(y, high))}" for px, _, high in line.band]
    back = [f"{_r(_x(x, px))} {_r(_y(y, low))}" for px, low, _ in reversed(line.band)]
    return element("path", d=f"M{'L'.join([*there, *back])}Z", fill_opacity=0.14, stroke="none")


def _lost(line: Line, x: Axis) -> list[Html]:
    """A mark at the top for each value that is not finite."""
    places = [px for px, py in line.points if not math.isfinite(py) and x.low <= px <= x.high]
    return [_text("×", _x(x, px), _TOP + 4, "middle", fill=line.colour) for px in places[:100]]


def _room(name: str, left: float, top: float, taken: Sequence[Box]) -> Box | None:
    """Where a name can stand beside its point without touching what is there."""
    wide, high = len(name) * 6.2, 14
    for dx, dy in ((8, 0), (-8 - wide, 0), (6, -12), (6, 12), (-6 - wide, -12), (-6 - wide, 12)):
        box = (left + dx, top + dy - high / 2, left + dx + wide, top + dy + high / 2)
        is_inside = box[0] >= _LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - _BOTTOM
        own = (left - 5, top - 5, left + 5, top + 5)
        others = [other for other in taken if other != own]
        if is_inside and not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others):
            return box
    return None


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, drawn: Sequence[Html | None], alone: bool = False) -> Html:
    """Axes, ticks and labels around what is drawn."""
    right, bottom, middle = WIDTH - _RIGHT, HEIGHT - _BOTTOM, (_TOP + HEIGHT - _BOTTOM) / 2
    n_most = 8
    while n_most > 2 and sum(len(label) * _CHARACTER + 14 for _, label in x.ticks(n_most)) > right - _LEFT:
        n_most -= 1
    rows = [(_y(y, value), label) for value, label in y.ticks(7)]
    columns = [(_x(x, value), label) for value, label in x.ticks(n_most)]
    parts = [
        _rule("".join(f"M{_LEFT} {_r(top)}H{right}" for top, _ in rows), stroke_opacity=0.13),
        _rule(
            f"M{_LEFT} {bottom}H{right}{''.join(f'M{_r(left)} {bottom}v4' for left, _ in columns)}", stroke_opacity=0.5
        ),
        _texts([(label, _LEFT - 6, top + 4) for top, label in rows], "end"),
        _texts([(label, left, bottom + 17) for left, label in columns], "middle"),
        _text(f"{x_label} {x.unit}".strip(), (_LEFT + right) / 2, HEIGHT - 5, "middle"),
        _text(_cut(y_label, 30), 12, middle, "middle", transform=f"rotate(-90 12 {middle:g})"),
        _text(y.unit, _LEFT, 11, "start") if y.unit else None,
    ]
    shape = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "font_size": _FONT}
    if alone:
        shape |= {"xmlns": "http://www.w3.org/2000/svg", "width": 2 * WIDTH, "font_family": "sans-serif"}
        shape |= {"color": "#1d2430", "style": "background:#ffffff"}
    return element("svg", element("title", f"{y_label} over {x_label}"), joined(parts), *drawn, **shape)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _r(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _rule(d: str, **attributes: object) -> Html:
    return element("path", d=d, stroke="currentColor", fill="none", **attributes)


def _texts(texts: Sequence[tuple[str, float, float]], align: str) -> Html:
    parts = [element("text", text, x=_r(x), y=_r(y)) for text, x, y in texts]
    return element("g", *parts, fill="currentColor", text_anchor=align)


def _text(text: str, x: float, y: float, align: str, size: int | None = None, **attributes: object) -> Html:
    attributes = {"fill": "currentColor", "stroke": "none", **attributes}
    return element("text", text, x=_r(x), y=_r(y), text_anchor=align, font_size=size, **attributes)


def _cut(text: str, n_most: int) -> str:
    return text if len(text) <= n_most else f"{text[: n_most - 1]}…"
