"""Write the parameters of a run, or of any checkpoint that is read, as another library has them."""

import copy
import logging
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf, open_dict

from rlhf.build import Experiment
from rlhf.config import config, require_range
from rlhf.errors import ConfigError
from rlhf.model.checkpoints import write_hf, write_orbax, write_peft, write_tokenizer
from rlhf.model.checkpoints.hf_config import require_expressible
from rlhf.model.checkpoints.write_folder import new_folder, require_free
from rlhf.model.lora import LoRA
from rlhf.model.settings import ModelSettings, VisionSettings
from rlhf.train.adapters import AdapterRun
from rlhf.train.checkpoint import load_parameters
from rlhf.train.sources import RunSource

log = logging.getLogger(__name__)

# the only classes that the model section of a stored config may name
_KNOWN = {f"{cls.__module__}.{cls.__qualname__}" for cls in (ModelSettings, VisionSettings, LoRA)}


@config
class Export:
    """`rlhf task=export format=hf model.checkpoint=RUN out=DIR`.

    out: a folder that does not exist or is empty.
    format: `hf` for transformers, `orbax` as on Kaggle, `peft` for the adapter of a LoRA run alone. The first two hold
        the adapter of such a run merged into its base.
    dtype: of the written numbers; none keeps what is stored.
    max_shard_gb: size of a safetensors file, in 10^9 bytes.

    The architecture is that of the run; for other checkpoints it is what `model` says.
    """

    out: str
    format: Literal["hf", "orbax", "peft"] = "hf"
    dtype: Literal["float32", "bfloat16"] | None = None
    max_shard_gb: float = 4.0

    def __post_init__(self):
        require_range(self, "max_shard_gb", above=0)

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """Where it was written, and how many parameters.

        Raises:
            ConfigError: there is nothing to export, no adapter for `peft`, or something in `out`.
        """
        out = Path(self.out).expanduser()
        require_free(out)
        if experiment.source is None:
            raise ConfigError("task=export needs model.checkpoint=…: a run's folder, or any checkpoint")
        if self.format == "peft":
            self._write_adapter(experiment.source, out)
        else:
            self._write_model(self._as_it_was(experiment), out)
        n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        log.info("written: %s (%s, %.2f GB)", out, self.format, n_bytes / 1e9)
        return {"path": str(out), "bytes": n_bytes}

    def _as_it_was(self, experiment: Experiment) -> Experiment:
        """The experiment with the model of the run, the adapter merged, and numbers of the type to be written."""
        cfg: Any = copy.deepcopy(experiment.cfg)
        source = experiment.source
        with open_dict(cfg):
            if isinstance(source, RunSource | AdapterRun):
                chosen = cfg.model
                cfg.model = _checked(source.record["config"]["model"])
                cfg.model.checkpoint, cfg.model.tokenizer = chosen.checkpoint, chosen.tokenizer
                for key in ("lora", "adapter", "base_quantisation"):
                    cfg.model[key] = None
                cfg.hardware.param_dtype = source.record["config"]["hardware"]["param_dtype"]
            elif source is not None:
                cfg.hardware.param_dtype = source.stored_dtype()
            cfg.hardware.param_dtype = self.dtype or cfg.hardware.param_dtype
        return Experiment(cfg, experiment.folder)

    def _write_model(self, experiment: Experiment, out: Path) -> None:
        a, dtype = experiment.model.architecture, experiment.settings.hardware.param_dtype
        if self.format == "hf":
            require_expressible(a)
        tokenizer, tree = experiment.tokenizer, experiment.parameters
        with new_folder(out) as folder:
            if self.format == "orbax":
                write_orbax.write(tree, a, dtype, folder / out.name)
                write_tokenizer.copy(tokenizer, folder)
            else:
                write_hf.write(tree, a, dtype, tokenizer, folder, int(self.max_shard_gb * 1e9))

    def _write_adapter(self, source: Any, out: Path) -> None:
        if not isinstance(source, AdapterRun):
            raise ConfigError(f"format=peft needs a run with model.lora; {source.pinned} has no adapter")
        tree, _ = load_parameters(source.path)
        with new_folder(out) as folder:
            write_peft.write(tree["adapter"], source.lora, source.record["started_from"], folder)


def _checked(stored: dict[str, Any]) -> DictConfig:
    """The model section of a stored config, which names no class but ours: building one runs code.

    Raises:
        ConfigError: it does.
    """
    for node in (stored, *stored.values()):
        target = node.get("_target_") if isinstance(node, dict) else None
        if target is not None and target not in _KNOWN:
            raise ConfigError(
                f"the run's config builds its model by {target}, which is none of {', '.join(sorted(_KNOWN))}"
            )
    return OmegaConf.create(stored)
