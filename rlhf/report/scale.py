"""From numbers to places on an axis: nice ticks, and curves of few enough points to draw."""

import dataclasses
import math
from collections.abc import Sequence

Point = tuple[float, float]

LONG = 60  # a curve of so many points is also drawn smoothed
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Axis:
    """The interval that an axis shows. is_log: distances are ratios. Use `axis_of` to make one."""

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False

    def share(self, value: float) -> float:
        """The place of a value, from 0 at the low end to 1 at the high one."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, n_most: int = 6) -> list[tuple[float, str]]:
        """Values to mark, with what to write there."""
        if self.is_log:
            return [(value, f"{value:g}") for value in _powers(self.low, self.high, n_most)]
        step = nice_step((self.high - self.low) / (n_most - 1))
        if self.is_whole:
            step = max(step, 1.0)
        first = math.ceil(self.low / step - 1e-9)
        values = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        places = max(0, -math.floor(math.log10(step * self.factor) + 1e-9))
        return [(value, f"{(value - self.offset) * self.factor + 0.0:.{places}f}") for value in values]

    @property
    def offset(self) -> float:
        """What is taken off ticks that differ in their last digits only."""
        size = self.high - self.low
        if self.is_log or size > 5e-4 * max(abs(self.low), abs(self.high)):
            return 0.0
        unit = 10.0 ** math.ceil(math.log10(size))
        return round((self.low + self.high) / 2 / unit) * unit

    @property
    def factor(self) -> float:
        """What ticks are multiplied with, so that they are short."""
        largest = max(abs(self.low - self.offset), abs(self.high - self.offset))
        if self.is_log or 1e-2 <= largest < 1e5:
            return 1.0
        return 10.0 ** -math.floor(math.log10(largest) + 1e-9)

    @property
    def unit(self) -> str:
        """What to write beside the axis where ticks are short for something longer: ×10⁻⁶."""
        power = -round(math.log10(self.factor))
        times = f"×10{str(power).translate(_SUPERSCRIPTS)}" if power else ""
        return f"{self.offset:.10g} + {times}".removesuffix(" ") if self.offset else times


def axis_of(values: Sequence[float], *, is_whole: bool = False, may_be_log: bool = False, margin: float = 0.06) -> Axis:
    """An axis on which all finite values have room.

    may_be_log: logarithmic if all are positive and the largest is more than 30 times the median.
    """
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    if may_be_log and low > 0 and high > 30 * sorted(known)[len(known) // 2]:
        return Axis(low / 1.3, high * 1.3, is_log=True)
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # equal, but for rounding
        room = abs(high) * 0.1 or 1.0
        return Axis(low - room, high + room, is_whole=is_whole)
    room = (high - low) * margin
    return Axis(low - room, high + room, is_whole=is_whole)


def nice_step(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * nice for nice in (1, 2, 5, 10) if power * nice >= step * (1 - 1e-9))


def _powers(low: float, high: float, n_most: int) -> list[float]:
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts in ((1, 2, 5), (1, 3), (1,)):
        values = [part * 10.0**power for power in range(start, end + 1) for part in parts]
        values = [value for value in values if low <= value <= high]
        if len(values) <= n_most:
            return values
    return values[:: math.ceil(len(values) / n_most)]


def smoothed(points: Sequence[Point], is_log: bool = False) -> list[Point]:
    """Means of the twentieth of the points around each (is_log: of their logarithms); nothing for a short curve."""
    n = len(points)
    if n < LONG:
        return []
    reach = max(n // 40, 1)
    total = [0.0]
    for _, value in points:
        total.append(total[-1] + (math.log(value) if is_log else value))
    means = []
    for place, (x, _) in enumerate(points):
        start, end = max(place - reach, 0), min(place + reach + 1, n)
        mean = (total[end] - total[start]) / (end - start)
        means.append((x, math.exp(mean) if is_log else mean))
    return means


def thinned(points: Sequence[Point], n_most: int) -> list[Point]:
    """At most about `n_most` points that look the same: of each stretch the lowest and the highest."""
    if len(points) <= n_most:
        return list(points)
    size = math.ceil(2 * len(points) / n_most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[place] for place in sorted(kept)]
