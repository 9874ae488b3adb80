"""SIGTERM and SIGINT as a request: the loop finishes its step, saves, and leaves. The second one ends the process."""

import logging
import os
import signal
import socket
import threading
from typing import Any, NoReturn

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While entered, the first SIGTERM or SIGINT only sets `received`; the second ends the process at once.

    Signals are read by a thread of its own, since the main thread runs no Python while a compiled function does. In
    another thread than the main one, and for a signal that the process ignores, nothing is changed.

    received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._watcher: threading.Thread | None = None
        self._wakeup = -1

    @property
    def exit_code(self) -> int:
        """What the process ends with, as shells count it: 143 after SIGTERM, 130 after SIGINT; 0 without a signal."""
        return 0 if self.received is None else 128 + self.received

    def leave(self, message: str) -> NoReturn:
        """End the run: log the message and raise SystemExit with `exit_code`."""
        name = "no signal" if self.received is None else signal.Signals(self.received).name
        log.warning("%s: %s", name, message)
        raise SystemExit(self.exit_code)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, writer = self._sockets = socket.socketpair()
        writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                self._handlers[number] = handler
                signal.signal(number, self._note)
        self._watcher = threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._sockets is None or self._watcher is None:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        reader, writer = self._sockets
        writer.close()
        self._watcher.join()
        reader.close()
        self._handlers, self._sockets, self._watcher = {}, None, None

    def _note(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received = number

    def _watch(self, reader: socket.socket) -> None:
        """Each signal arrives here as a byte, whatever the main thread does."""
        n_received = 0
        while data := reader.recv(16):
            for number in data:
                n_received += number in self._handlers
                if n_received > 1:
                    os._exit(128 + number)
                if number in self._handlers:
                    self._note(number, None)
                    log.warning("%s: stopping after this step; once more ends at once", signal.Signals(number).name)
