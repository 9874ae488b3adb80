"""The strict json reader: every odd byte is used correctly or refused with line and reason."""

import gzip
import json

import pytest

from rlhf.data.jsonl import read_json
from rlhf.errors import DataError


def write(tmp_path, data, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def rows(path):
    return list(read_json(path))


def only_problem(path) -> tuple[int, str]:
    problems = [(line, str(row)) for line, row in read_json(path) if isinstance(row, DataError)]
    assert len(problems) == 1
    return problems[0]


def test_lines_are_counted_from_one_and_blank_ones_skipped(tmp_path):
    path = write(tmp_path, '{"a": 1}\n\n  \n{"a": 2}\n')
    assert rows(path) == [(1, {"a": 1}), (4, {"a": 2})]


def test_byte_order_mark_and_crlf(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n')
    assert rows(path) == [(1, {"a": "x"}), (2, {"a": "y"})]


def test_unicode_line_separators_end_no_line(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    path = write(tmp_path, json.dumps({"a": text}, ensure_ascii=False) + "\n")
    assert rows(path) == [(1, {"a": text})]


def test_a_row_of_a_megabyte(tmp_path):
    text = "wörd " * 200_000
    path = write(tmp_path, json.dumps({"a": text}) + '\n{"a": "next"}\n')
    assert rows(path) == [(1, {"a": text}), (2, {"a": "next"})]


def test_a_last_line_without_line_end_is_fine(tmp_path):
    assert rows(write(tmp_path, '{"a": 1}\n{"a": 2}')) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_truncated_last_line(tmp_path):
    line, problem = only_problem(write(tmp_path, '{"a": 1}\n{"a": "tw'))
    assert line == 2
    assert problem == (
        "no JSON: Unterminated string starting at character 7; the line has no line end: the file may be cut off"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": [1, -Infinity]}', "-Infinity is no JSON number"),
        ('{"a": 1e999}', "1e999 is too large for a number"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' occurs twice"),
        ('{"a": {"b": 1, "b": 1}}', "key 'b' occurs twice"),
        (r'{"a": "x\ud800y"}', r"field 'a' holds U\+D800, half of a surrogate pair"),
        (r'{"a": [{"b": "\uDE00"}]}', r"field 'b' holds U\+DE00, half of a surrogate pair"),
        (r'{"\udc00": 1}', r"a key holds U\+DC00"),
        ("[1, 2]", "the row is a JSON list, not an object"),
        ('"text"', "the row is a JSON string, not an object"),
        ("null", "the row is a JSON null, not an object"),
        ("{'a': 1}", "no JSON: Expecting property name"),
        ('{"a": 1} {"a": 2}', "no JSON: Extra data at character 10"),
        ('{"a": "tab\there"}', "no JSON: Invalid control character"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "no JSON that can be read: Exceeds the limit"),
        ("\ufeff{}", r"no JSON: a byte-order mark \(U\+FEFF\) at character 1; only a file may begin with one"),
        ('{"a": 1}\ufeff{"a": 2}', r"no JSON: a byte-order mark \(U\+FEFF\) at character 9;"),
    ],
)
def test_refused_with_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path, '{"ok": 1}\n' + line + '\n{"ok": 2}\n')
    number, problem = only_problem(path)
    assert number == 2
    with pytest.raises(DataError, match=reason):
        raise DataError(problem)
    assert [row for _, row in rows(path) if isinstance(row, dict)] == [{"ok": 1}, {"ok": 2}]


def test_a_surrogate_pair_is_a_character(tmp_path):
    assert rows(write(tmp_path, r'{"a": "\ud83d\ude00"}')) == [(1, {"a": "😀"})]


def test_bytes_that_are_no_utf8(tmp_path):
    line, problem = only_problem(write(tmp_path, b'{"a": 1}\n{"a": "caf\xe9"}\n'))
    assert (line, problem) == (2, "byte 11 of the line is no UTF-8 (0xe9)")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_named(tmp_path, encoding):
    mark = b"" if encoding == "utf-16" else b"\xfe\xff"
    with pytest.raises(DataError, match="is UTF-16, not UTF-8 text"):
        rows(write(tmp_path, mark + '{"a": 1}\n'.encode(encoding)))


def test_empty_files_are_refused(tmp_path):
    for data in ("", "\n \n", "\ufeff"):
        with pytest.raises(DataError, match="holds no rows"):
            rows(write(tmp_path, data))
    with pytest.raises(DataError, match="holds no rows"):
        rows(write(tmp_path, "[ ]", "rows.json"))


def test_a_list_in_a_json_file(tmp_path):
    path = write(tmp_path, '\ufeff[\n {"a": 1},\n {\n  "a": 2\n },\r\n 7, {"a": "\\ud800"}\n]\n', "rows.json")
    found = rows(path)
    assert found[:2] == [(2, {"a": 1}), (3, {"a": 2})]
    assert [(line, str(problem)) for line, problem in found[2:]] == [
        (6, "the row is a JSON number, not an object"),
        (6, "field 'a' holds U+D800, half of a surrogate pair"),
    ]


def test_json_files_may_also_hold_a_row_a_line(tmp_path):
    assert rows(write(tmp_path, '{"a": 1}\n{"a": 2}\n', "rows.json")) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_list_that_breaks_off(tmp_path):
    with pytest.raises(DataError, match=r"rows\.json:2: no JSON: .*; the rest of the list can't be read"):
        rows(write(tmp_path, '[{"a": 1},\n{"a":', "rows.json"))
    with pytest.raises(DataError, match=r"rows\.json:1: the list breaks off after the row that begins here"):
        rows(write(tmp_path, '[{"a": 1}', "rows.json"))
    with pytest.raises(DataError, match=r"rows\.json:1: NaN is no JSON number"):
        rows(write(tmp_path, '[{"a": NaN}]', "rows.json"))


def test_gzip(tmp_path):
    packed = gzip.compress(b'{"a": 1}\n{"a": 2}\n')
    assert rows(write(tmp_path, packed, "rows.jsonl.gz")) == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(DataError, match="is no whole gzip file"):
        rows(write(tmp_path, packed[:20], "cut.jsonl.gz"))
    with pytest.raises(DataError, match=r"is gzip \(name it \.gz\)"):
        rows(write(tmp_path, packed, "rows.jsonl"))
