"""A strict reader of json and jsonl files: what it can't read, it refuses with the line and the reason.

Lines end at the byte 0x0A only, so U+2028 inside a string is no line end. A byte-order mark at the start of the file
and CRLF are understood. Refused: NaN, Infinity and numbers too large for a float, keys that occur twice, lone
surrogates, bytes that are no UTF-8, rows that are no objects.
"""

import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import DataError

_HALF_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_WHITE = " \t\r\n"
_BOM = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip (name it .gz)"}

Row = dict[str, Any]


def read_json(path: Path) -> Iterator[tuple[int, Row | DataError]]:
    """The rows of a file with the line each begins at; a bad row comes as the error that says why.

    A `.json` file may hold one list of objects instead of an object a line.

    Raises:
        DataError: the file is no UTF-8 text or holds no row, or a list breaks off, so that the rest can't be read.
    """
    n_rows = 0
    for line, row in _rows(path):
        n_rows += 1
        yield line, row
    if not n_rows:
        raise DataError(f"{path} holds no rows")


def _rows(path: Path) -> Iterator[tuple[int, Row | DataError]]:
    with _opened(path) as file:
        try:
            start = file.read(len(_BOM))
            for mark, name in _OTHER_ENCODINGS.items():
                if start.startswith(mark):
                    raise DataError(f"{path} is {name}, not UTF-8 text")
            file.seek(len(_BOM) if start == _BOM else 0)
            if ".jsonl" not in path.suffixes and ".ndjson" not in path.suffixes:
                data = file.read()
                yield from _list_rows(path, data) if data.lstrip()[:1] == b"[" else _line_rows(io.BytesIO(data))
            else:
                yield from _line_rows(file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is no whole gzip file: {error}") from error


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _line_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, Row | DataError]]:
    """One line is in memory at a time."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, _parse_line(line.removesuffix(b"\n"))
        except DataError as error:
            hint = "" if line.endswith(b"\n") else "; the line has no line end: the file may be cut off"
            yield number, DataError(f"{error}{hint}")


def _parse_line(line: bytes) -> Row:
    value = _decode(_DECODER.decode, text_of(line))
    return _checked(value, line)


def text_of(line: bytes) -> str:
    """Raises DataError where a line is no UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} of the line is no UTF-8 (0x{line[error.start]:02x})") from None


def _list_rows(path: Path, data: bytes) -> Iterator[tuple[int, Row | DataError]]:
    """The objects of one list, each with the line it begins at."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte {error.start + 1} of the file is no UTF-8") from None
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    if text[position : position + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = _decode(_DECODER.raw_decode, text, position)
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}; the rest of the list can't be read") from None
        try:
            yield line, _checked(value, text[position:end].encode())
        except DataError as error:
            yield line, error
        position = _skip(text, end)
        mark = text[position : position + 1]
        if mark == "]" and not text[position + 1 :].strip(_WHITE):
            return
        if mark != ",":
            raise DataError(f"{path}:{line}: the list breaks off after the row that begins here")
        position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITE:
        position += 1
    return position


def _decode(parse: Any, text: str, *position: int) -> Any:
    try:
        return parse(text, *position)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        place = f"at character {error.pos - sum(position) + 1}"
        if text.startswith("\ufeff", error.pos):
            raise DataError(f"no JSON: a byte-order mark (U+FEFF) {place}; only a file may begin with one") from None
        reason = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        raise DataError(f"no JSON: {reason} {place}") from None
    except RecursionError:
        raise DataError("no JSON that can be read: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"no JSON that can be read: {error}") from None


def _checked(value: Any, source: bytes) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"the row is a JSON {_NAMES[type(value)]}, not an object")
    if _HALF_ESCAPE.search(source):
        _refuse_surrogates(value, "row")
    return value


def _refuse_surrogates(value: Any, name: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key, "a key")
            _refuse_surrogates(item, f"field {key!r}")
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item, name)
    elif isinstance(value, str):
        half = next((character for character in value if "\ud800" <= character <= "\udfff"), None)
        if half is not None:
            raise DataError(f"{name} holds U+{ord(half):04X}, half of a surrogate pair")


def _refuse_constant(name: str) -> Any:
    raise DataError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise DataError(f"{text} is too large for a number")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"key {double!r} occurs twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles, parse_constant=_refuse_constant, parse_float=_finite)
_NAMES = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
