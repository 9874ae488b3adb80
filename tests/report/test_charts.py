"""Axes and curves, by hand."""

import math
import re
import xml.etree.ElementTree

import pytest

from rlhf.report.definitions import define, unit_of
from rlhf.report.scale import Axis, axis_of, nice_step, smoothed, thinned
from rlhf.report.svg import Line, Spot, line_chart, scatter_chart


def labels(axis: Axis) -> list[str]:
    return [label for _, label in axis.ticks()]


@pytest.mark.parametrize(("step", "nice"), [(0.21, 0.5), (0.2, 0.2), (1.0, 1.0), (2.1, 5.0), (7e-7, 1e-6), (60, 100)])
def test_nice_steps(step, nice):
    assert math.isclose(nice_step(step), nice)


def test_ticks_are_short():
    assert labels(Axis(0, 1)) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    small = Axis(0, 3e-6)
    assert (labels(small), small.unit) == (["0", "1", "2", "3"], "×10⁻⁶")
    large = Axis(0, 2_500_000)
    assert (labels(large), large.unit) == (["0.0", "0.5", "1.0", "1.5", "2.0", "2.5"], "×10⁶")
    near = Axis(0.99998, 1.00004)  # ticks that differ in their last digits only
    assert near.unit == "1 + ×10⁻⁵"
    assert labels(near) == ["-2", "0", "2", "4"]
    assert labels(Axis(0.9, 2.1, is_whole=True)) == ["1", "2"]


def test_a_wide_range_is_logarithmic():
    axis = axis_of([1.0, 2.0, 3.0, 1000.0], may_be_log=True)
    assert axis.is_log
    assert labels(axis) == ["1", "10", "100", "1000"]
    assert math.isclose(Axis(1, 100, is_log=True).share(10), 0.5)
    assert not axis_of([-1.0, 2.0, 1000.0], may_be_log=True).is_log
    assert not axis_of([1.0, 2.0, 50.0], may_be_log=True).is_log


@pytest.mark.parametrize(
    "values", [[], [0.0], [5.0, 5.0 + 1e-9], [math.nan, 2.0], [math.inf], [1e300, -1e300], [5e-324]]
)
def test_every_set_of_values_has_an_axis(values):
    axis = axis_of(values)
    assert axis.low < axis.high
    assert all(math.isfinite(value) for value, _ in axis.ticks())


def test_a_thinned_curve_keeps_its_extremes():
    points = [(float(i), math.sin(i)) for i in range(1000)]
    points[513] = (513.0, 40.0)
    kept = thinned(points, 100)
    assert len(kept) <= 102
    assert {(0.0, 0.0), (513.0, 40.0), points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:100], 100) == points[:100]


def test_a_smoothed_curve():
    points = [(float(i), float(i % 2)) for i in range(80)]
    means = smoothed(points)  # of 2 · (80 // 40) + 1 = 5 points
    assert means[0] == (0.0, 1 / 3)
    assert means[10] == (10.0, 2 / 5)
    assert means[11] == (11.0, 3 / 5)
    assert smoothed(points[:59]) == []
    powers = smoothed([(float(i), 10.0 ** (i % 2)) for i in range(80)], is_log=True)
    assert math.isclose(powers[10][1], 10 ** (2 / 5))


def test_values_that_are_not_finite_are_marked():
    chart = line_chart([Line("training", [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)])], "step", "loss")
    assert chart.count("×") == 2
    (path,) = re.findall(r'd="(M[^"]*)" fill="none" stroke-width="1.8"', chart)
    assert path.count("l") == 1  # from the first to the last


def test_names_of_points_do_not_overlap():
    spots = [Spot(f"coef={n}", 1 + n % 3 * 0.01, 1.0) for n in range(9)]
    root = xml.etree.ElementTree.fromstring(scatter_chart(spots, "kl", "reward", is_standalone=True))
    texts = [node for node in root.iter() if node.tag.endswith("text") and (node.text or "").startswith("coef")]
    places = [(node.get("text-anchor"), float(node.get("x")), float(node.get("y"))) for node in texts]
    assert 2 <= len(places) < 9
    boxes = [(x if side == "start" else x - 37, y) for side, x, y in places]
    for place, (left, top) in enumerate(boxes):
        assert all(abs(top - y) >= 12 or abs(left - x) >= 37 for x, y in boxes[:place])


def test_definitions_come_from_the_table_of_metrics():
    assert unit_of("val/accuracy") == "share"
    assert unit_of("kl/k3") == "nats per token"
    (part,) = define("rewards/gsm8k/mean")
    assert part.section == "Rewards"
    assert "of one reward, without its weight" in part.formula
    assert {found.section for found in define("nll")} == {"SFT", "Preferences"}
    assert define("something/else") == []
