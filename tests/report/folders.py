"""Folders as runs leave them, written by hand, and pages read as a browser reads them."""

import html.parser
import json
from pathlib import Path
from typing import Any

LOG = """\
13:00:00 INFO {n_steps} rows
13:00:01 INFO 4 rows a step = 1 minibatch × 1 microbatch of 4; 1 optimizer step a step; {n_steps} steps over 48 rows (1.00 epochs)
13:00:01 INFO model: 79,840 parameters, 79,840 trained (100%); in float32
13:00:01 INFO devices: 1 of 1 × cpu (cpu)
13:02:31 INFO step {n_steps}/{n_steps}  loss 1
"""  # noqa: E501


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, rows: list[Any], overrides: list[str] = (), n_steps: int = 2, log: str = "") -> Path:
    """A run of so many steps; `log`: what its log ends with."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(word)}\n" for word in overrides))
    config = "name: null\nseed: 3\nmodel:\n  checkpoint: null\nalgorithm:\n  _target_: rlhf.algorithms.dpo.DPO\n"
    (folder / ".hydra" / "config.yaml").write_text(f"{config}hydra:\n  secret: 1\n")
    write_lines(folder / "metrics.jsonl", rows)
    (folder / "log.txt").write_text(LOG.format(n_steps=n_steps) + log, encoding="utf-8")
    return folder


class Page(html.parser.HTMLParser):
    """A page: its text, the names of its elements, its attributes; every element must be closed in order."""

    VOID = ("meta", "!doctype")

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text, self.names, self.attributes, self._open = "", [], [], []
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data if not self._open or self._open[-1] != "style" else ""

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]
