"""Several processes as one run: who is who, that all are there, and that none waits for one that is gone.

Before JAX connects the processes, each but the first opens a connection to the first, at the port after the
coordinator's. It compares their configs, tells where the run's folder is, and stays open: when a process dies the
system closes its end, so the others know at once; a machine that is gone is noticed by its silence. JAX by itself would
wait for a lost process inside a collective operation, on some devices for ever.

Without such processes every function here does nothing, and JAX is not imported.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from rlhf.errors import ConfigError, TrainingError
from rlhf.processes.line import Line

log = logging.getLogger(__name__)

NUMBER_VARIABLE = "RLHF_PROCESS"
_KEY = "hardware.processes.number"
_BEATS = 6  # signs of life in the time after which a silent process counts as gone
_MILLISECONDS_A_DAY = 24 * 3600 * 1000  # of waiting for a value; who dies meanwhile is noticed by the connections


def number_given(words: list[str]) -> int:
    """The number of this process, as the command line or the environment gives it; 0 where neither does."""
    texts = [os.environ.get(NUMBER_VARIABLE, "0")]
    texts += [word.partition("=")[2] for word in words if word.lstrip("+").startswith(f"{_KEY}=")]
    return int(texts[-1]) if texts[-1].isdecimal() else 0


def quiet_words(number: int) -> list[str]:
    """Overrides with which Hydra writes nothing, and the log shows warnings only: for all processes but the first."""
    if number == 0:
        return []
    return [
        "hydra.output_subdir=null", "hydra.run.dir=.", "~hydra.job_logging.handlers.file",
        "hydra.job_logging.root.handlers=[console]", "hydra.job_logging.root.level=WARNING",
    ]  # fmt: skip


class Group:
    """The processes of a run, seen from one of them: `number` of `count`.

    timeout_seconds: after which one that is silent, or does not come, counts as gone.
    """

    def __init__(self, number: int, count: int, timeout_seconds: float):
        self.number, self.count, self.timeout_seconds = number, count, timeout_seconds
        self.folder = ""
        self.n_values = 0  # told by `from_first`
        self._lines: dict[int, Line] = {}  # of the first process one to each other, else one to the first
        self._done: set[int] = set()
        self._all_done = threading.Event()
        self._has_asked = False  # for a stop

    def meet(self, host: str, port: int, identity: dict[str, str], folder: str) -> None:
        """Wait until all are there; then know the folder of the first.

        Raises:
            ConfigError: they differ in their configs. TrainingError: one did not come in time.
        """
        if self.number == 0:
            self.folder = folder
            self._gather(port, identity)
        else:
            self._come(host, port, identity)
        for other, line in self._lines.items():
            threading.Thread(target=self._listen, args=(other, line), name=f"process {other}", daemon=True).start()
        threading.Thread(target=self._beat, name="signs of life", daemon=True).start()

    def _gather(self, port: int, identity: dict[str, str]) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        try:
            server = socket.create_server(("", port), backlog=self.count)
        except OSError as error:
            raise ConfigError(
                f"process 0 can't listen at port {port}, the one after the coordinator's: {error}"
            ) from error
        with server:
            while len(self._lines) < self.count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    line = Line(server.accept()[0])
                    hello = line.receive(max(deadline - time.monotonic(), 0.01))
                except TimeoutError:
                    self._refuse(
                        f"{len(self._lines) + 1} of {self.count} processes came within {self.timeout_seconds:g} s; "
                        f"missing: {', '.join(str(n) for n in range(1, self.count) if n not in self._lines)}",
                        TrainingError,
                    )
                if hello is None or "hello" not in hello:
                    continue  # something else that tried the port
                other = hello["hello"]
                self._compare(hello, other, identity, line)
                self._lines[other] = line
        for line in self._lines.values():
            line.send(folder=self.folder)

    def _compare(self, hello: dict[str, Any], other: int, identity: dict[str, str], line: Line) -> None:
        theirs = hello["identity"]
        changed = [k for k in sorted({*identity, *theirs}) if identity.get(k) != theirs.get(k)]
        reason = None
        if changed:
            told = "; ".join(f"{k}={identity.get(k)} in process 0, {theirs.get(k)} there" for k in changed[:4])
            reason = f"process {other} has another config: {told}"
        elif other in self._lines or not 0 < other < self.count:
            reason = f"a second process came as number {other}: each needs its own, from 0 to {self.count - 1}"
        if reason is not None:
            line.send(refused=reason)
            line.close()
            self._refuse(reason, ConfigError)

    def _refuse(self, reason: str, kind: type[Exception]) -> NoReturn:
        self._tell(refused=reason)
        self.close()
        raise kind(reason)

    def _come(self, host: str, port: int, identity: dict[str, str]) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        where = f"process 0 at {host}:{port} (hardware.processes.coordinator, and the port after its)"
        while True:
            try:
                line = Line(socket.create_connection((host, port), timeout=5))
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TrainingError(f"{where} did not answer within {self.timeout_seconds:g} s: {error}") from error
                time.sleep(0.1)
        line.send(hello=self.number, identity=identity)
        try:
            answer = line.receive(self.timeout_seconds + 5)
        except TimeoutError:
            answer = None
        if answer is None or "refused" in answer:
            line.close()
        if answer is None:
            raise TrainingError(f"{where} ended before all processes were there")
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        self.folder, self._lines = answer["folder"], {0: line}

    def _beat(self) -> None:
        while not self._all_done.wait(self.timeout_seconds / _BEATS):
            self._tell(beat=1)

    def _tell(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(**message)

    def _listen(self, other: int, line: Line) -> None:
        """What one other process says, until it says that it is done; if it falls silent before, this one ends."""
        while True:
            try:
                message = line.receive(self.timeout_seconds)
            except TimeoutError:
                self._end(f"process {other} has given no sign of life for {self.timeout_seconds:g} s")
            if message is None:
                if other in self._done or self._all_done.is_set():
                    return
                self._end(f"process {other} has ended before the run did")
            elif "lost" in message:
                self._end(message["lost"])
            elif "done" in message:
                self._done.add(other)
                if self.number > 0 or len(self._done) == self.count - 1:
                    self._all_done.set()

    def _end(self, reason: str) -> NoReturn:
        """End this process, whatever its main thread waits for."""
        log.error("%s; process %d ends too, since no run goes on without one of its processes", reason, self.number)
        self._tell(lost=reason)
        _exit_now(1)

    def close(self) -> None:
        """End the connections."""
        self._all_done.set()
        for line in self._lines.values():
            line.close()

    def fail(self, error: BaseException) -> NoReturn:
        """End this process, which failed, and tell the others why."""
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            time.sleep(1)  # a broken collective operation is often the first sign that another process is gone
        self._tell(lost=f"process {self.number} failed: {type(error).__name__}: {str(error)[:500]}")
        _exit_now(1)

    def leave(self) -> None:
        """End together: whoever is done first waits for the others."""
        import jax

        if self.number > 0:
            self._tell(done=1)
            self._all_done.wait(_MILLISECONDS_A_DAY / 1000)
        else:
            self._all_done.wait(_MILLISECONDS_A_DAY / 1000)
            self._tell(done=1)
        self.close()
        jax.distributed.shutdown()

    @property
    def _store(self) -> Any:
        """Values by name that all processes can set and get."""
        from jax._src import distributed

        return distributed.global_state.client

    def share(self, make: Callable[[], Any]) -> Any:
        key, self.n_values = f"rlhf/value/{self.n_values}", self.n_values + 1
        if self.number == 0:
            value = make()
            self._store.key_value_set(key, json.dumps(value))
            return value
        return json.loads(self._store.blocking_key_value_get(key, _MILLISECONDS_A_DAY))

    def agreed_stop(self, step: int, received: int | None) -> int | None:
        """See `agreed_stop` below.

        A process that looks here in step i has the numbers of step i - 1, so every other one has begun it, and none is
        later than i + 1: what is set now, all see in step i + 2.
        """
        if received is not None and not self._has_asked:
            self._has_asked = True
            with contextlib.suppress(Exception):  # another process has asked before
                self._store.key_value_set("rlhf/stop", f"{step + 2} {received}")
        try:
            at, number = map(int, self._store.key_value_try_get("rlhf/stop").split())
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
        return number if step >= at else None


_group: Group | None = None


def join(
    number: int | None,
    count: int,
    coordinator: str | None,
    timeout_seconds: float,
    identity: dict[str, str],
    folder: str,
) -> str:
    """Become process `number` of `count`; the folder of the run, which is that of process 0. Once in a process.

    coordinator: `host:port` of process 0; the port after it must be free too. identity: what must be the same in all.

    Raises:
        ConfigError, TrainingError: a setting is missing or differs, or a process did not come.
    """
    global _group
    if _group is not None:
        return folder
    if number is None or coordinator is None:
        raise ConfigError(
            f"several processes need {_KEY} (or {NUMBER_VARIABLE}) and hardware.processes.coordinator=HOST:PORT (or "
            "RLHF_COORDINATOR)"
        )
    import jax

    host, port = coordinator.rsplit(":", 1)
    group = Group(number, count, timeout_seconds)
    group.meet(host, int(port) + 1, identity, folder)
    seconds = max(int(timeout_seconds), 10)
    try:
        jax.distributed.initialize(
            coordinator, count, number, cluster_detection_method="deactivate", initialization_timeout=seconds,
            heartbeat_timeout_seconds=2 * seconds, shutdown_timeout_seconds=seconds,
        )  # fmt: skip
    except Exception as error:
        raise TrainingError(f"process {number} of {count} can't be connected at {coordinator}: {error}") from error
    _group = group
    return group.folder


def is_first() -> bool:
    """Whether this process is the one that writes: the only one, or number 0."""
    return _group is None or _group.number == 0


def is_several() -> bool:
    return _group is not None


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first process, in all of them; it must be JSON. The others don't call it."""
    return make() if _group is None else _group.share(make)


def agreed_stop(step: int, received: int | None) -> int | None:
    """The signal after which the run is to stop at this step, the same in all processes; `received` where there is one.

    Call once a step, after the numbers of the step before were fetched.
    """
    return received if _group is None else _group.agreed_stop(step, received)


def fail(error: BaseException) -> None:
    """Where there are several processes: end this one and tell the others, which would wait for it."""
    if _group is not None:
        _group.fail(error)


def leave() -> None:
    """At the end of a run: wait for the others."""
    global _group
    if _group is not None:
        _group.leave()
        _group = None


def _exit_now(code: int) -> NoReturn:
    """Without the ends that wait for other processes; what was logged is written."""
    for handler in logging.getLogger().handlers:
        with contextlib.suppress(Exception):
            handler.flush()
    os._exit(code)
