"""A connection between two processes."""

import contextlib
import json
import socket
import threading
from typing import Any


class Line:
    """A connection on which both sides send JSON objects, one a line."""

    def __init__(self, connection: socket.socket):
        self._socket, self._lock = connection, threading.Lock()
        self._file = connection.makefile("r", encoding="utf-8")

    def send(self, **message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # who reads the other end is told of a break
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """End the connection; a thread that waits for a message gets its end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None at the end of the connection.

        Raises:
            TimeoutError: nothing came.
        """
        self._socket.settimeout(seconds)
        try:
            line = self._file.readline()
        except TimeoutError:
            raise
        except (OSError, ValueError):  # broken, or closed by this side
            return None
        return json.loads(line) if line.endswith("\n") else None
