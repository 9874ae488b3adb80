"""The one entry point: compose a config, then do its task in the run's own folder.

Nothing here imports jax before a run begins, so that `--help`, `--cfg` and tab completion answer at once.
"""

import logging
import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rlhf import messages, processes, sweep
from rlhf.errors import FolderInUse, UserError
from rlhf.overrides import (
    with_absolute_config_path,
    with_fixed_as_choices,
    with_flags_first,
    with_quotes,
    with_whole_values,
)
from rlhf.refused import put_back, replaced_configs
from rlhf.report.write import try_write_report
from rlhf.sweeper import composed_once

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
CONF = str(next(p for p in (_HERE / "conf", _HERE.parent / "conf") if (p / "config.yaml").is_file()))


def run_folder(resume: str | None, name: str | None, choices: DictConfig, now: str) -> str:
    """The folder of a run: the one to go on with, or a new one named after what is run."""
    if resume not in (None, "auto"):
        return str(resume)
    chosen = [choices.get(group) for group in ("experiment", "pipeline", "task", "algorithm")]
    label = name or next((c for c in chosen if c not in (None, "null", "train")), "repeated")  # no choices with -cp
    return f"outputs/{label}/{now}"


OmegaConf.register_new_resolver("rlhf_run_dir", run_folder, replace=True)


_failures: list[BaseException] = []


def make_repeatable(config_folder: Path) -> None:
    """Let `rlhf -cp RUN/.hydra -cn config` make a run like any other: add to the stored config where runs and logs go.

    Hydra stores everything but its own section. That section is taken from our file, without what this run changed.
    """
    stored = config_folder / "config.yaml"
    if stored.is_file():
        ours = OmegaConf.load(Path(CONF) / "config.yaml").hydra
        text = re.sub(r"(?m)^resume: .*$", "resume: null", stored.read_text(encoding="utf-8"))
        stored.write_text(f"{text}{OmegaConf.to_yaml({'hydra': ours})}", encoding="utf-8")


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def main(cfg: DictConfig) -> None:
    """One job: the only one of a run, or one of a sweep."""
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    is_sweep = job.mode == RunMode.MULTIRUN
    make_repeatable(folder / str(job.output_subdir))
    try:
        from rlhf import tasks  # jax is imported here, after Hydra has set the environment

        result = tasks.run(cfg, folder, overrides=list(job.overrides.task), keep=is_sweep)
    except SystemExit:  # a signal: the run goes on later
        try_write_report(folder)
        raise
    except Exception as error:
        is_refused = isinstance(error, FolderInUse)
        if is_refused:
            put_back(folder / str(job.output_subdir))
        if isinstance(error, UserError):
            log.error("%s", error)
        else:
            log.exception("the run failed")  # the reason is in this run's log.txt; a sweep goes on to its next job
        if not is_refused:
            try_write_report(folder)
            sweep.record(job, folder, error=error)
        processes.fail(error)
        _failures.append(error)
        if is_sweep:
            raise
    else:
        try_write_report(folder)
        sweep.record(job, folder, result=result)


def cli() -> None:
    """The console command: `main`, with every mistake of the user told in one message and no traceback."""
    _failures.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are; Hydra would print its own version and exit
    words = with_quotes(with_flags_first(with_absolute_config_path(sys.argv[1:])))
    words = with_whole_values(with_fixed_as_choices(words))
    sys.argv = [sys.argv[0], *words, *processes.quiet_words(processes.number_given(words))]
    sys.path.insert(0, os.getcwd())  # a user's own module beside the command, as `python -m` would find it
    try:
        with composed_once(), replaced_configs():
            main()
    except Exception as error:
        if error not in _failures:  # else it was told, with its traceback where it is no user's
            message = messages.of_hydra(error)
            if message is None:
                raise
            sys.exit(f"error: {message}")
    finally:
        sweep.report()
        processes.leave()
    if _failures:
        sys.exit(1)


if __name__ == "__main__":
    cli()
