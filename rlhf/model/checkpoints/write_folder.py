"""A new folder that appears complete or not at all, and never in the place of anything."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf.errors import CheckpointError, ConfigError


def require_free(path: Path) -> None:
    """Raises ConfigError unless there is nothing at `path`, or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"out={path} holds something already; nothing is overwritten or deleted: choose another folder"
        )


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end; after an error it is gone.

    Raises:
        ConfigError: there is something at `path`. CheckpointError: the disk refuses.
    """
    require_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        require_free(path)
        partial.replace(path)  # also in the place of an empty folder
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
