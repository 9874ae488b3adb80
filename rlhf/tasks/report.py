"""Write the HTML report of what lies in a folder: a run, a sweep, a pipeline."""

import logging
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig

from rlhf.config import config
from rlhf.errors import ConfigError
from rlhf.report.write import write_report

log = logging.getLogger(__name__)


@config
class Report:
    """`rlhf task=report run=FOLDER`."""

    is_dry: ClassVar[bool] = True  # needs no devices, no weights and no data

    run: str

    def __call__(self, cfg: DictConfig, folder: Path) -> dict[str, Any]:
        """Writes `report.html` into the folder that is reported on; its path.

        Raises:
            ConfigError: there is no such folder. DataError: there is nothing to report in it.
        """
        reported = Path(self.run).expanduser()
        if not reported.is_dir():
            raise ConfigError(f"run={self.run} is no folder: give that of a run, a sweep or a pipeline")
        path = write_report(reported)
        log.info("written: %s (%.0f kB)", path, path.stat().st_size / 1000)
        return {"path": str(path)}
