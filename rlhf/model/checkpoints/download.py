"""Downloads in a process of their own, watched from outside: a server that says nothing must not hold us for ever.

The clients' own first requests have no time-out. The child's bar is on stderr; its answer is the last line of stdout.
"""

import contextlib
import fcntl
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints import hub, kaggle
from rlhf.model.checkpoints.handles import HubHandle, KaggleHandle

log = logging.getLogger(__name__)

Handle = KaggleHandle | HubHandle

N_TRIES = 5  # as long as each brings something
_LOOK_SECONDS = 0.1


def world(handle: Handle) -> Any:
    return kaggle if isinstance(handle, KaggleHandle) else hub


def pinned(handle: Handle) -> str:
    """Text that names the handle even where a folder of the same name is."""
    return f"{'kaggle' if isinstance(handle, KaggleHandle) else 'hf'}://{handle}"


def local(handle: Handle, timeout_seconds: float) -> tuple[Path, Handle]:
    """The folder with the files of a handle, from the cache or fetched now, and the handle with its version.

    timeout_seconds: without a new byte, after which a server is given up.

    Raises:
        CheckpointError: it can't be had; says why and what to do.
    """
    module = world(handle)
    found = module.cached(handle)
    if found is None:
        folder = module.cache_folder(handle)
        with _alone(folder):
            found = module.cached(handle) or _fetched(handle, folder, timeout_seconds)
    elif str(found[1]) != str(handle):
        log.info("%s: taken from the cache as %s", handle, found[1])
    path, full = found
    if isinstance(full, HubHandle):
        try:
            hub.verify(path)
        except CheckpointError as error:
            raise CheckpointError(f"{full}: {error}") from error
    return path, full


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process of this machine fetches into a folder; the others wait and then find it there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".rlhf-lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process fetches into %s: waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetched(handle: Handle, folder: Path, timeout_seconds: float) -> tuple[Path, Handle]:
    log.info("fetching %s into %s", handle, folder)
    for number in range(1, N_TRIES + 1):
        before = _n_bytes(folder)
        answer = _one_try(handle, folder, timeout_seconds)
        if "path" in answer:
            return Path(answer["path"]), type(handle)(**answer["handle"])
        grown = _n_bytes(folder) - before
        if not answer["again"] or number == N_TRIES or grown <= 0:
            break
        log.warning("%s: %s; going on (%d MB came)", handle, answer["error"], grown // 10**6)
    raise CheckpointError(f"model.checkpoint={handle}: {answer['error']}")


def _one_try(handle: Handle, folder: Path, timeout_seconds: float) -> dict[str, Any]:
    order = {"world": type(handle).__name__, "handle": handle.__dict__}
    command = [sys.executable, "-m", "rlhf.model.checkpoints.fetch", json.dumps(order)]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        seen, since = _activity(child.pid, folder), time.monotonic()
        while True:
            try:
                printed, _ = child.communicate(timeout=_LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                now = _activity(child.pid, folder)
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > timeout_seconds:
                    waited = f"nothing came for {timeout_seconds:g} s (model.download_timeout)"
                    return {"error": f"{waited}: the same command tries again", "again": True}
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
    lines = printed.splitlines()
    if not lines:
        return {"error": f"the download ended without an answer (exit status {child.returncode})", "again": False}
    return json.loads(lines[-1])


def _activity(pid: int, folder: Path) -> tuple[int, str]:
    """Bytes that came, and where the system tells it bytes that the child has read: it may be checking a file."""
    counters = Path(f"/proc/{pid}/io")
    try:
        read = counters.read_text().split("\n")[0] if counters.exists() else ""
    except OSError:
        read = ""
    return _n_bytes(folder), read


def _n_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # files are renamed while we look
            total += 0 if path.is_symlink() else path.stat().st_size
    return total
