"""Replies of a judge on disk: a line of JSON each, so that equal questions are asked once, over all runs."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class ReplyCache:
    """path: the file, which other runs may write to as well; None keeps replies for this run alone."""

    def __init__(self, path: Path | None):
        self.path = path
        self._replies: dict[str, str] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().split(b"\n"):
                try:
                    row: Any = json.loads(line)
                    self._replies[row["key"]] = row["reply"]
                except (ValueError, TypeError, KeyError):
                    continue  # a line that a killed run did not finish

    @staticmethod
    def key(*parts: Any) -> str:
        """What tells a question to a judge from any other."""
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def add(self, found: dict[str, str]) -> None:
        """Keep replies by key."""
        self._replies |= found
        if self.path is None or not found:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{json.dumps({'key': key, 'reply': reply})}\n" for key, reply in found.items())
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            start = "\n" if os.fstat(file).st_size else ""  # ends a line that a killed run did not
            os.write(file, (start + lines).encode())
        finally:
            os.close(file)
