"""What one command does with a composed config; a task is one file here and one yaml in conf/task."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

Result = dict[str, Any]


def run(cfg: DictConfig, folder: Path, overrides: list[str], keep: bool = False) -> Result:
    """Do the task of `cfg` in `folder`; what it returns goes into the table of a sweep or pipeline.

    overrides: those the user gave; a pipeline hands them to its stages.
    keep: other runs of this process may want the same weights and data: keep them.
    """
    from rlhf import pipeline
    from rlhf.build import Experiment
    from rlhf.sections import task
    from rlhf.train import lock

    made: Any = task(cfg)
    if getattr(made, "is_dry", False) and cfg.pipeline is None:
        return made(cfg, folder)
    folder = _join_processes(cfg, folder, overrides, keep)
    with lock.held(folder):
        if cfg.pipeline is not None:
            return pipeline.run(cfg, folder, overrides)
        return made(Experiment(cfg, folder, keep))


def _join_processes(cfg: DictConfig, folder: Path, overrides: list[str], is_sweep: bool) -> Path:
    """Meet the other processes of the run, if it has several; the folder of the run, which is that of the first.

    Raises:
        ConfigError: this can't be done by several processes; or as `rlhf.processes.join`.
    """
    from rlhf import processes, records
    from rlhf.errors import ConfigError
    from rlhf.sections import section
    from rlhf.train.hardware import Hardware

    wanted, given = section(cfg, "hardware", Hardware).processes, processes.number_given(overrides)
    if wanted is None or wanted.count == 1:
        if given:
            raise ConfigError(f"this is process {given}, but hardware.processes is not set: choose hardware=multihost")
        return folder
    name = type(section(cfg, "task")).__name__.lower()
    if is_sweep or (name not in ("train", "evaluate") and cfg.pipeline is None):
        raise ConfigError(
            f"hardware.processes.count={wanted.count}: several processes do task=train and task=evaluate, not "
            f"{'sweeps' if is_sweep else f'task={name}'}"
        )
    if (wanted.number or 0) != given:
        raise ConfigError(
            f"hardware.processes.number={wanted.number} must be given on the command line or as "
            f"{processes.NUMBER_VARIABLE}, so that it is known before anything is written"
        )
    own = ("hardware.processes.number", "hardware.visible_devices")
    same = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "pipeline"]), resolve=True
    )
    identity = {key: str(value) for key, value in records.flatten(same).items() if key not in own}
    found = processes.join(
        wanted.number, wanted.count, wanted.coordinator, wanted.timeout_seconds, identity, str(folder.resolve())
    )
    return Path(found)
