"""What counts as a score. Imports nothing heavy: worker processes use it too."""

import math
import numbers
from typing import Any

LARGEST = 3.4e38  # of float32, which scores become


def as_score(value: Any) -> float | str:
    """The value as a finite number, or what is wrong with it. Numbers of numpy and jax count, truth values too."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        shown = repr(value) if isinstance(value, str | bytes | type(None)) else ""
        return f"is no number but {type(value).__name__} {shown:.60}".rstrip()
    try:
        number = float(value)
    except OverflowError:
        return "is too large a number"
    if math.isfinite(number) and abs(number) > LARGEST:
        return f"is too large a number ({number:g})"
    return number if math.isfinite(number) else f"is {number}"
