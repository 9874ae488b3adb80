"""What a refused command leaves as it was: the record of the run that is in its folder.

Hydra writes the config of a command into the folder before we can say that the folder holds another run.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core import utils

_replaced: dict[Path, str] = {}


@contextlib.contextmanager
def replaced_configs() -> Iterator[None]:
    """Meanwhile the text of each config that Hydra replaces is kept."""
    save: Any = utils._save_config

    def keep_and_save(cfg: Any, filename: str, output_dir: Path) -> None:
        path = Path(output_dir) / filename
        if path.is_file():
            _replaced[path.resolve()] = path.read_text(encoding="utf-8")
        save(cfg, filename, output_dir)

    utils._save_config = keep_and_save  # Hydra has no place for it: its callbacks come before or after
    try:
        yield
    finally:
        utils._save_config = save
        _replaced.clear()


def put_back(folder: Path) -> None:
    """The configs in `folder` as they were before this command; what it says from now on is not in the run's log."""
    for path, text in _replaced.items():
        if path.parent == folder.resolve():
            path.write_text(text, encoding="utf-8")
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()
