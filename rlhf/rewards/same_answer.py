"""Whether two short answers are the same: numbers with units, lists, choices by letter or text, words.

Only decimal arithmetic and patterns that are linear in a bounded text, never an evaluation of it.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from rlhf.rewards.answers import leading_number, number_value

LONGEST = 500  # characters of an answer that are read

_UNITS = {
    "degree": "°", "deg": "°", "percent": "%", "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "millimeter": "mm", "millimetre": "mm", "gram": "g", "kilogram": "kg",
    "liter": "l", "litre": "l", "hour": "h", "hr": "h", "minute": "min", "second": "s", "sec": "s", "yr": "year",
    "inches": "inch", "feet": "foot", "dollar": "$", "usd": "$",
}  # fmt: skip
_LATEX = [
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\boxed\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^\{?\\circ\}?|\\degree"), "°"),
    (re.compile(r"\\[,;!: ]|~"), " "),
    (re.compile(r"\\([%$])"), r"\1"),
]
_LETTER = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? )?[(\[]?([a-z])[)\].:]*(?:\s+(.*))?$", re.S
)


def plain_text(text: str) -> str:
    """The answer in lower case without LaTeX, emphasis, outer marks and needless space."""
    text = unicodedata.normalize("NFKC", text[:LONGEST]).replace("\u2212", "-").strip()
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = text.strip(" \n\t*_`").removeprefix("$").removesuffix("$").removesuffix(".")
    return " ".join(text.lower().split())


def quantity(text: str) -> tuple[Fraction, str] | None:
    """The number that a whole answer is, and its unit in one spelling ("": none); None if it is something else."""
    found = leading_number(plain_text(text))
    if found is None:
        return None
    number, rest, currency = found
    unit = rest.strip(" .*_`)$").strip()
    if len(unit.split()) > 3 or any(c.isdigit() for c in unit.replace("m2", "").replace("m3", "")):
        return None
    unit = _UNITS.get(unit.removesuffix("s"), _UNITS.get(unit, unit.removesuffix("s") if len(unit) > 2 else unit))
    return number_value(number), unit or currency


def is_same_quantity(found: tuple[Fraction, str], expected: tuple[Fraction, str], tolerance: Fraction) -> bool:
    """Equal numbers, within an absolute tolerance; units, where both have one, are the same."""
    units = {unit for _, unit in (found, expected)} - {""}
    return abs(found[0] - expected[0]) <= tolerance and len(units) < 2


def tolerance_of(expected: Fraction, fields: Mapping[str, Any], relative: float) -> Fraction:
    """How far a number may be from the expected one: half a unit of the last digit of `precision` where the row has it
    (MathVista's floats), else a share of a number with decimals; a whole number must be met exactly."""
    precision = fields.get("precision")
    if fields.get("answer_type") == "float" and isinstance(precision, int | float) and 0 <= precision < 20:
        return Fraction(1, 2 * 10 ** int(precision))
    return Fraction(0) if expected.denominator == 1 else abs(expected) * Fraction(relative)


def choice(text: str, choices: Sequence[str]) -> int | None:
    """The place of the choice that an answer names: by its text, its letter, both, or its number; None: of none, or of
    two different ones."""
    said, texts = plain_text(text), [plain_text(one) for one in choices]
    if said in texts:
        return texts.index(said)
    if (found := _LETTER.match(said)) is not None and ord(found[1]) - ord("a") < len(choices):
        place, rest = ord(found[1]) - ord("a"), (found[2] or "").strip()
        others = [number for number, one in enumerate(texts) if one == rest]
        return None if others and place not in others else place
    if (amount := quantity(said)) is not None:
        amounts = [quantity(one) for one in choices]
        same = [n for n, one in enumerate(amounts) if one is not None and is_same_quantity(amount, one, Fraction(0))]
        return same[0] if len(same) == 1 else None
    return None


def listed(text: str) -> list[str] | None:
    """The elements of an answer that is a list: `[0, 2, 8]`, or `0, 2, 8`."""
    said = plain_text(text).strip("[](){} ")
    return [one.strip() for one in said.split(",")] if "," in said else None


def choices_of(fields: Mapping[str, Any]) -> list[str]:
    """The choices of a row, as a list or as JSON; none for a free answer."""
    found = fields.get("choices")
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = None
    return [str(one) for one in found] if isinstance(found, list | tuple) else []


def is_same(found: str, expected: str, fields: Mapping[str, Any], tolerance: float) -> bool:
    """Whether two answers to a row's question are equal.

    fields: the row; `choices`, and MathVista's `answer_type` and `precision`, are heeded. tolerance: relative, of
    numbers with decimals.
    """
    if choices := choices_of(fields):
        place = choice(expected, choices)
        if place is not None:
            return choice(found, choices) == place
    if plain_text(found) == plain_text(expected):
        return bool(plain_text(found))
    if fields.get("answer_type") == "list" or "[" in expected:
        ours, theirs = listed(found), listed(expected)
        return (
            ours is not None
            and theirs is not None
            and len(ours) == len(theirs)
            and all(is_same(a, b, {}, tolerance) for a, b in zip(ours, theirs, strict=True))
        )
    ours_amount, theirs_amount = quantity(found), quantity(expected)
    if ours_amount is None or theirs_amount is None:
        return False
    return is_same_quantity(ours_amount, theirs_amount, tolerance_of(theirs_amount[0], fields, tolerance))


def overlap(found: str, expected: str) -> float:
    """F1 of the words of two texts (Rajpurkar et al., 2016, section 6.1)."""
    ours, theirs = (Counter(re.findall(r"\w+", plain_text(text))) for text in (found, expected))
    common = sum((ours & theirs).values())
    return 2 * common / (sum(ours.values()) + sum(theirs.values())) if common else 0.0
