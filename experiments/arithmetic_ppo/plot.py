"""Draw the over-optimised run of FOLDER: python plot.py FOLDER [WHERE]  writes over_optimisation.svg.

A sweep draws reward against divergence itself (reward_kl.svg in its folder).
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from check import SCORE
from runs import evaluated

WIDTH, HEIGHT, EDGE = 480, 300, 56  # pixels
INK, BLUE, RED = "#333", "#1f6fb4", "#c23b22"


class Axes:
    """A frame from data to pixels. lows and highs: of x and y."""

    def __init__(self, lows: tuple[float, float], highs: tuple[float, float]):
        self.lows, self.spans = lows, tuple(high - low or 1.0 for low, high in zip(lows, highs, strict=True))

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        across, up = (x - self.lows[0]) / self.spans[0], (y - self.lows[1]) / self.spans[1]
        return EDGE + across * (WIDTH - 2 * EDGE), HEIGHT - EDGE - up * (HEIGHT - 2 * EDGE)


def text(x: float, y: float, words: str, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def curve(axes: Axes, points: Iterable[tuple[float, float]], colour: str) -> list[str]:
    """A line through the points, with a dot at each."""
    places = [axes(*point) for point in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>', *dots]


def scale(axes: Axes, numbers: Iterable[float], side: str, colour: str = INK) -> list[str]:
    """Numbers along the side `bottom`, `left` or `right`."""
    parts = []
    for number in numbers:
        if side == "bottom":
            x, _ = axes(number, axes.lows[1])
            parts.append(text(x, HEIGHT - EDGE + 16, f"{number:g}"))
        else:
            _, y = axes(axes.lows[0], number)
            x, anchor = (EDGE - 6, "end") if side == "left" else (WIDTH - EDGE + 6, "start")
            parts.append(text(x, y + 4, f"{number:g}", colour, anchor))
    return parts


def picture(path: Path, parts: Iterable[str]) -> None:
    inner = f'width="{WIDTH - 2 * EDGE}" height="{HEIGHT - 2 * EDGE}" fill="none" stroke="{INK}"'
    frame, back = f'<rect x="{EDGE}" y="{EDGE}" {inner}/>', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-size="12">'
    path.write_text("\n".join([head, back, frame, *parts, "</svg>\n"]), encoding="utf-8")


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    return [round(low + (high - low) * place / n, 3) for place in range(n + 1)]


def over_optimisation(folder: Path, path: Path) -> None:
    """Score of the reward model (left) and share of right answers (right) over the steps."""
    rows = evaluated(folder / "without_hold")
    steps, scores, right = ([row[name] for row in rows] for name in ("step", SCORE, "val/accuracy"))
    of_score = Axes((0, min(scores)), (max(steps), max(scores)))
    of_right = Axes((0, min(right)), (max(steps), max(right)))
    parts = [
        *curve(of_score, zip(steps, scores, strict=True), BLUE),
        *curve(of_right, zip(steps, right, strict=True), RED),
    ]
    parts += scale(of_score, steps, "bottom") + scale(of_score, ticks(min(scores), max(scores)), "left", BLUE)
    parts += scale(of_right, ticks(min(right), max(right)), "right", RED)
    parts += [
        text(EDGE, EDGE - 24, "score of the reward model", BLUE, "start"),
        text(WIDTH - EDGE, EDGE - 24, "share of right answers", RED, "end"),
        text(WIDTH / 2, HEIGHT - 16, "steps of PPO on the reward model, KL coefficient near 0"),
    ]
    picture(path, parts)


def main() -> None:
    folder = Path(sys.argv[1])
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).resolve().parent
    over_optimisation(folder, where / "over_optimisation.svg")


if __name__ == "__main__":
    main()
