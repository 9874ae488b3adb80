"""HTML as values: whatever is not `Html` is escaped when it is put into an element."""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MISSING = "–"
_STYLE = Path(__file__).with_name("style.css")
# what a browser may load: its own text and styles; so no text of a sample can fetch or run anything, escaped or not
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# control characters, and those that turn the direction of what follows, as something that can be seen
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "␡"}
_CONTROL |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """Any value as HTML: `Html` as it is, everything else as the text it is; control characters are made visible."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).translate(_CONTROL)))


def element(name: str, *children: Any, **attributes: Any) -> Html:
    """`<name attributes>children</name>`; None stands for no attribute and no child.

    A trailing underscore of an attribute's name is dropped, others become hyphens: class_, stroke_width.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    return Html(f"<{name}{head}>{joined(children)}</{name}>")


def joined(parts: Iterable[Any]) -> Html:
    return Html("".join(escape(part) for part in parts if part is not None))


def table(heads: Sequence[Any], rows: Iterable[Sequence[Any]], n_texts: int = 1) -> Html:
    """A table that scrolls sideways where the window is narrow; the first `n_texts` columns are text, the others
    numbers."""

    def line(kind: str, cells: Sequence[Any]) -> Html:
        classes = [None] * n_texts + ["number"] * max(len(cells) - n_texts, 0)
        return element("tr", *(element(kind, cell, class_=c) for cell, c in zip(cells, classes, strict=False)))

    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", element("thead", line("th", heads)), body), class_="wide")


def section(title: str, *children: Any) -> Html | None:
    """A heading with what is under it; nothing where nothing is under it."""
    kept = [child for child in children if child]
    return element("section", element("h2", title, id=anchor(title)), *kept) if kept else None


def folded(title: Any, *children: Any, is_open: bool = False) -> Html:
    """A part that opens at a click."""
    return element("details", element("summary", title), *children, open="" if is_open else None)


def anchor(text: str) -> str:
    """A name that a link can point to."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def number(value: Any) -> str:
    """A number as a reader wants it: four digits, thousands apart; what is missing as a dash."""
    if value is None or isinstance(value, bool):
        return MISSING if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def page(title: str, *children: Any) -> str:
    """A whole page that needs no other file."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{joined(children)}</body></html>\n'


def contents(parts: Iterable[Html | None]) -> Html:
    """Links to the sections among some parts of a page."""
    found = re.findall(r'<h2 id="([^"]+)">([^<]+)</h2>', joined(parts))
    return element("nav", *(element("a", Html(title), href=f"#{target}") for target, title in found))
