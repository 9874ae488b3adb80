"""TensorBoard events of a run, written by tensorboardX without its thread and queue: what is flushed is in the file."""

import time
from pathlib import Path
from typing import Any

from rlhf.train import durable

_MOST_ROWS = 16  # rows held back before they are written …
_LONGEST_SECONDS = 10.0  # … and for how long


class EventFile:
    """Scalars by tag and step, in a new event file beside those of earlier attempts.

    The file begins with a mark that makes TensorBoard forget what earlier files have after `after_step` (0: all). It is
    opened, and tensorboardX imported (0.1 s), when rows are first written out: 16 rows or 10 seconds after they came,
    or at `flush`.
    """

    def __init__(self, folder: Path, after_step: int):
        self._folder = folder
        self._purge_step = after_step + 1 if after_step > 0 else 0
        self._waiting: list[tuple[float, int, dict[str, float]]] = []
        self._since = time.monotonic()
        self._writer: Any = None
        self._path: Path | None = None

    def append(self, step: int, scalars: dict[str, float]) -> None:
        self._waiting.append((time.time(), step, scalars))
        if len(self._waiting) >= _MOST_ROWS or time.monotonic() - self._since > _LONGEST_SECONDS:
            self._write_out()

    def _write_out(self) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._waiting and self._writer is None:
            self._open()
        for wall_time, step, scalars in self._waiting:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            self._writer.write_event(Event(wall_time=wall_time, step=step, summary=Summary(value=values)))
        if self._writer is not None:
            self._writer.flush()
        self._waiting = []
        self._since = time.monotonic()

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        # TensorBoard reads files in the order of their names, which end in a second: number those of one second.
        suffix = f".{len(list(self._folder.glob('events.out.tfevents.*'))):04d}"
        self._writer = EventsWriter(str(self._folder / "events"), filename_suffix=suffix)
        (self._path,) = self._folder.glob(f"events.out.tfevents.*{suffix}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=self._purge_step, session_log=start))

    def flush(self) -> None:
        """Put all rows on the disk."""
        if self._waiting:
            self._write_out()
        if self._path is not None:
            durable.flush_file(self._path)

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._writer, self._path = None, None
