"""What each metric is, from the tables of docs/metrics.md."""

import dataclasses
import functools
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "metrics.md", _PACKAGE.parent / "docs" / "metrics.md")  # installed; in a checkout


@dataclasses.dataclass(frozen=True)
class Definition:
    """A row of a table there. section: the heading it stands under."""

    section: str
    formula: str
    unit: str
    over: str


def define(name: str) -> list[Definition]:
    """The definitions of a metric, `val/` apart: several where algorithms give a name different meanings, none where
    it is not in the tables."""
    name = name.removeprefix("val/")
    exact = [definition for pattern, definition in _rows() if pattern == re.escape(name)]
    if exact:
        return exact
    found = [definition for pattern, definition in _rows() if re.fullmatch(pattern, name)]
    return found[:1]  # a pattern that stands earlier is the narrower one


def unit_of(name: str) -> str:
    """The unit of a metric; empty where it has none or is not known."""
    units = {definition.unit for definition in define(name)} - {"–", "as the share", "as without"}
    return units.pop() if len(units) == 1 else ""


@functools.cache
def _rows() -> tuple[tuple[str, Definition], ...]:
    """(pattern of a name, definition) of each row that defines one."""
    path = next((place for place in _PLACES if place.is_file()), None)
    found, section = [], ""
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        if line.startswith("## "):
            section = line[3:].partition(" (")[0].replace("`", "")
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| `") or len(cells) != 4:
            continue
        plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "") for cell in cells[1:]]
        for name in re.findall(r"`([^`]+)`", cells[0]):
            pattern = re.sub(r"<\w+>", "[^/]+", re.escape(name)).replace("…", ".+")
            found.append((pattern, Definition(section, *plain)))
    return tuple(found)
