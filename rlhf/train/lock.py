"""A run's folder belongs to one process at a time.

The lock is the system's (`flock`), so it is free again whenever its process ends, however that ends. It holds between
the machines that share a disk where the file system passes locks on, as NFS does with a lock service; where it does
not, that is said in the log and the run goes on without.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rlhf import processes
from rlhf.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NAME = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """While a run writes into its folder. Of several processes of one run, the first holds it for all.

    Raises:
        ConfigError: another process has it; names the folder and the process.
    """
    file = _taken(folder) if processes.is_first() else None
    try:
        yield
    finally:
        if file is not None:
            (folder / NAME).unlink(missing_ok=True)  # before the lock is let go of: nobody else's can be there
            os.close(file)


def _taken(folder: Path) -> int | None:
    if fcntl is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ConfigError(
                f"{folder} is in use by {holder}: two runs can't write into one folder; wait for its end, or choose "
                "another hydra.run.dir"
            ) from None
        except OSError as error:
            log.warning("%s can't be locked (%s): nothing keeps another run from writing into it", folder, error)
            os.close(file)
            return None
        if _is_at(path, file):
            break
        os.close(file)  # its holder took it away in between
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return file


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
