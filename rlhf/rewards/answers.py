"""Numbers as final answers, in GSM8K's form: the text ends in `#### 1,080`.

Text in, text or truth value out. Only decimal arithmetic, never an evaluation of the text, so no answer can hang or run
anything.
"""

import re
from decimal import Decimal
from fractions import Fraction

from rlhf.errors import DataError

MARKER = "####"  # what stands in front of the final answer
_LONGEST = 1000  # characters behind the marker that are read: a longer number is none

_NUMBER = re.compile(
    r"[ \t*_`(]*"  # emphasis around the number is no part of it
    r"(?P<sign>[-+\u2212]?)[ \t]*(?:\\?(?P<currency>[$€£¥₹])[ \t]*)?(?P<late_sign>[-+\u2212]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?P<decimals>\.[0-9]+)?"
    r"(?:[ \t]*/[ \t]*(?P<divisor>[0-9]+))?"
    r"(?![0-9]|[.,][0-9]|[eE][-+]?[0-9])"  # 1,08 and 1.2.3 and 1e5 are no numbers of this form
    r"(?![ \t]*[-+*/^=:×·–\u2212]*[ \t]*\\?[$€£¥₹]?\.?[0-9])"  # nor are 3 * 4, 5-10, 5:30 and 1 000
)


def final_answer(text: str, marker: str = MARKER) -> str | None:
    """The number behind the last `marker`, as plain digits: no separators, currency, unit or full stop.

    `#### $1,080.50 a day.` gives `1080.50`; signs and fractions (`-3/4`) stay. None if there is no marker, or something
    else than one number behind the last.
    """
    start = text.rfind(marker)
    # A marker of letters is a word of its own: the end of `USA: 5` is not `A: 5`.
    while start > 0 and marker[0].isalnum() and text[start - 1].isalnum():
        start = text.rfind(marker, 0, start)
    return None if start < 0 else _number(text[start + len(marker) :])


def leading_number(text: str) -> tuple[str, str, str] | None:
    """The number that a text begins with, as `final_answer` gives it; what follows it; its currency sign or ""."""
    found, number = _NUMBER.match(text[:_LONGEST]), _number(text)
    if found is None or number is None:
        return None
    return number, text[found.end() :], found["currency"] or ""


def number_value(number: str) -> Fraction:
    """The value of a result of `final_answer`."""
    return _value(number)


def reference_answer(text: str, marker: str = MARKER) -> str:
    """The number of a reference: behind its last marker if it has one, else the text itself.

    Raises:
        DataError: there is none.
    """
    answer = final_answer(text, marker) if marker in text else _number(text)
    if answer is None:
        shown = text if len(text) <= 80 else "…" + text[-80:]
        raise DataError(f"the reference answer {shown!r} holds no number (marker {marker!r})")
    return answer


def is_same_number(first: str, second: str) -> bool:
    """Whether two results of `final_answer` or `reference_answer` are equal as numbers: `18.0` is `18`."""
    return _value(first) == _value(second)


def has_format(text: str, marker: str = MARKER) -> bool:
    """Whether the text gives its final answer in the form asked for, right or wrong."""
    return final_answer(text, marker) is not None


def is_correct(text: str, reference: str, marker: str = MARKER) -> bool:
    """Whether the final answer of `text` is the number of `reference`.

    Raises:
        DataError: the reference holds no number.
    """
    expected = reference_answer(reference, marker)
    answer = final_answer(text, marker)
    return answer is not None and is_same_number(answer, expected)


def _value(number: str) -> Fraction:
    numerator, _, divisor = number.partition("/")
    return Fraction(Decimal(numerator)) / Fraction(Decimal(divisor or "1"))


def _number(text: str) -> str | None:
    found = _NUMBER.match(text[:_LONGEST])
    if found is None or (found["sign"] and found["late_sign"]) or (found.end() == _LONGEST < len(text)):
        return None
    divisor = found["divisor"]
    if divisor is not None and not divisor.strip("0"):
        return None
    sign = "-" if (found["sign"] or found["late_sign"]) in ("-", "\u2212") else ""
    number = sign + (found["whole"].replace(",", "") or "0") + (found["decimals"] or "")
    return number if divisor is None else f"{number}/{divisor}"
