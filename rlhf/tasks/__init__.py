"""What one command does with a composed config; a task is one file here and one yaml in conf/task."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

Result = dict[str, Any]


def run(cfg: DictConfig, folder: Path, overrides: list[str], keep: bool = False) -> Result:
    """Do the task of `cfg` in `folder`; what it returns goes into the table of a sweep or pipeline.

    overrides: those the user gave; a pipeline hands them to its stages.
    keep: other runs of this process may want the same weights and data: keep them.
    """
    from rlhf import pipeline
    from rlhf.build import Experiment
    from rlhf.sections import task

    if cfg.pipeline is not None:
        return pipeline.run(cfg, folder, overrides)
    return task(cfg)(Experiment(cfg, folder, keep))
