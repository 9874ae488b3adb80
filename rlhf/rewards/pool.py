"""Worker processes with a wall-clock limit: for functions that may loop for ever, crash or return anything.

A worker is a new Python (never a fork: JAX has threads) that stays between steps. One that is too slow is killed with
everything it started, and another takes its place.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from rlhf.errors import ConfigError
from rlhf.rewards.base import Failed

log = logging.getLogger(__name__)

_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from rlhf.rewards.worker import main; main()"


@dataclasses.dataclass(frozen=True)
class Limits:
    """seconds: for all calls of one `Pool.run` together. call_seconds: for one call; none: the same. start_seconds: for
    a worker to start and import the function. memory_gb: address space of a worker, in 10^9 bytes; none: no limit."""

    seconds: float
    call_seconds: float | None = None
    start_seconds: float = 60.0
    memory_gb: float | None = None


@dataclasses.dataclass(frozen=True)
class Function:
    """What is called. path: of its import. parameters: names of what it is called with, in order."""

    path: str
    parameters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the function: its arguments, and how many scores it must return."""

    arguments: tuple
    n: int


class _Worker:
    """One process. busy: the place of the call it works on. deadline: when it is too late."""

    def __init__(self, function: Function, limits: Limits):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps([os.path.abspath(place) for place in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that what it starts can be ended with it
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)
        os.set_blocking(self.replies.fileno(), False)
        self.is_ready, self.deadline = False, time.monotonic() + limits.start_seconds
        self.busy: int | None = None
        self.outgoing, self.incoming = b"", b""
        memory = None if limits.memory_gb is None else int(limits.memory_gb * 1e9)
        self.send({**dataclasses.asdict(function), "memory_bytes": memory})

    def send(self, message: Any) -> None:
        body = pickle.dumps(message)
        self.outgoing += len(body).to_bytes(8, "big") + body

    def push(self) -> None:
        """Write what the pipe takes now."""
        try:
            done = os.write(self.requests.fileno(), self.outgoing)
            self.outgoing = self.outgoing[done:]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outgoing = b""  # it ended: reading says so

    def pull(self) -> dict[str, Any] | None:
        """The next whole reply, if one is there. A process that ended is told as an error."""
        try:
            part = os.read(self.replies.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        if not part:
            try:
                code = self.process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                return {"error": "its process closed the connection", "is_gone": True}
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            return {"error": f"its process ended ({how})", "is_gone": True}
        self.incoming += part
        line, newline, rest = self.incoming.partition(b"\n")
        if not newline:
            return None
        self.incoming = rest
        try:
            return json.loads(line)
        except ValueError:
            return {"error": "its process sent something unreadable", "is_gone": True}

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.requests.close()
        self.replies.close()


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


class Pool:
    """`n_workers` processes that each call the function at an import path.

    what: how messages name the function.
    """

    def __init__(self, function: Function, what: str, limits: Limits, n_workers: int = 1):
        """
        Raises:
            ConfigError: the function can't be imported.
        """
        self.function, self.what, self.limits = function, what, limits
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _end, self._workers)  # at the latest when the process ends
        for _ in range(n_workers):
            self._workers.append(_Worker(function, limits))
        self._wait_until_ready()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        """Until one worker is."""
        while not any(worker.is_ready for worker in self._workers):
            self._attend({}, [], time.monotonic() + self.limits.start_seconds)

    def run(self, calls: Sequence[Call]) -> list[list[float | Failed]]:
        """The scores of every call. Returns within `limits.seconds`, and the time to end a process, once a worker is
        ready.

        Raises:
            ConfigError: the function can't be imported.
        """
        self._wait_until_ready()
        results: dict[int, list[float | Failed]] = {}
        deadline = time.monotonic() + self.limits.seconds
        waiting = deque(range(len(calls)))
        while len(results) < len(calls):
            for worker in self._workers:
                if waiting and worker.is_ready and worker.busy is None:
                    self._assign(worker, waiting.popleft(), calls, deadline)
            if not self._attend(results, calls, deadline):
                break
        for place in waiting:
            results[place] = [Failed(f"not judged within the {self.limits.seconds:g} s of all")] * calls[place].n
        return [results[place] for place in range(len(calls))]

    def _assign(self, worker: _Worker, place: int, calls: Sequence[Call], deadline: float) -> None:
        limit = self.limits.call_seconds or self.limits.seconds
        worker.busy, worker.deadline = place, min(time.monotonic() + limit, deadline)
        worker.send({"arguments": calls[place].arguments, "n": calls[place].n, "limit_seconds": self.limits.seconds})

    def _attend(self, results: dict, calls: Sequence[Call], deadline: float) -> bool:
        """Wait for the next thing to happen and note it. False: the time is up, and workers that were late ended."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                if worker.outgoing:
                    selector.register(worker.requests, selectors.EVENT_WRITE, worker)
            until = min([w.deadline for w in self._workers if not w.is_ready or w.busy is not None] + [deadline])
            events = selector.select(max(0.0, until - time.monotonic()))
        for key, mask in events:
            if key.data not in self._workers:
                continue  # an event before this one was its end
            if mask & selectors.EVENT_WRITE:
                key.data.push()
            elif (reply := key.data.pull()) is not None:
                self._note(key.data, reply, results, calls)
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.busy is not None and now >= worker.deadline:
                self._note(worker, {"error": self._too_late(worker, deadline), "is_gone": True}, results, calls)
            elif not worker.is_ready and now >= worker.deadline:
                self.close()
                raise ConfigError(f"{self.what}: not imported within {self.limits.start_seconds:g} s")
        return now < deadline

    def _too_late(self, worker: _Worker, deadline: float) -> str:
        if worker.deadline < deadline or self.limits.call_seconds is None:
            return f"it took longer than {self.limits.call_seconds or self.limits.seconds:g} s"
        return f"not judged within the {self.limits.seconds:g} s of all"

    def _note(self, worker: _Worker, reply: dict[str, Any], results: dict, calls: Sequence[Call]) -> None:
        if not worker.is_ready:
            if "error" in reply:
                self.close()
                raise ConfigError(f"{self.what}: {reply['error']}")
            worker.is_ready = True
            return
        if worker.busy is not None:
            n = calls[worker.busy].n
            if "error" in reply:
                results[worker.busy] = [Failed(reply["error"])] * n
            else:
                results[worker.busy] = [Failed(s) if isinstance(s, str) else float(s) for s in reply["scores"]]
            worker.busy = None
        if reply.get("is_gone"):
            worker.kill()
            self._workers[self._workers.index(worker)] = _Worker(self.function, self.limits)
