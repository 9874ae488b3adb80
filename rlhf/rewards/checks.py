"""Functions that run in worker processes: they may be slow or never end on what a model writes.

Each returns one score for each text; `{"failed": reason}` in its place says that it could not be judged. Imports
nothing heavy by itself.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

Found = list[float | dict[str, str]]


def search(texts: Sequence[str], pattern: str, is_whole: bool, scores: tuple[float, float]) -> Found:
    """scores: of a text that matches the pattern, and of one that does not."""
    compiled = re.compile(pattern)
    match = compiled.fullmatch if is_whole else compiled.search
    return [scores[0] if match(text) else scores[1] for text in texts]


def verify_math(texts: Sequence[str], references: Sequence[str], scores: tuple[float, float, float]) -> Found:
    """scores: of an answer equal to the reference, of another one, and of a text without one."""
    return [_verified(text, reference, scores) for text, reference in zip(texts, references, strict=True)]


def _verified(text: str, reference: str, scores: tuple[float, float, float]) -> float | dict[str, str]:
    from math_verify import parse, verify

    expected = _expected(reference)
    if not expected:
        return {"failed": f"math-verify reads no answer in the reference {reference!r:.80}"}
    found = parse(text, parsing_timeout=0)  # the limit is that of the worker: alarms work in main threads only
    if not found:
        return scores[2]
    return scores[0] if verify(expected, found, timeout_seconds=0, raise_on_error=True) else scores[1]


@functools.lru_cache(maxsize=4096)
def _expected(reference: str) -> Any:
    from math_verify import parse

    is_marked = "$" in reference or "\\boxed" in reference
    return parse(reference if is_marked else f"${reference}$", parsing_timeout=0)


def import_math_verify() -> None:
    """So that a worker is ready only when the library is imported, which takes seconds."""
    import logging

    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of time-outs that it does not watch
