"""How much memory a run will take, whether it fits, and what would (`rlhf task=plan …`), before anything is downloaded.

Rows are taken to be as long as `dataset.max_length` lets them be (with the longest answer, where answers are
generated), and the two answers of a pair to be run apart: what is there later is at most that.
"""

import dataclasses
import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from omegaconf import DictConfig

from rlhf.algorithms.rehearsal import keeps_reference, rehearse
from rlhf.config import config, require_range
from rlhf.model.gemma3 import Gemma3
from rlhf.model.lora import abstract_adapter
from rlhf.model.quantised import quantise
from rlhf.model.sharding import make_mesh
from rlhf.sampling.shapes import shape_for
from rlhf.sections import Settings, settings
from rlhf.train.plan import (
    Need,
    Setup,
    flops_of,
    generation_of,
    largest_microbatch,
    logits_bytes,
    need_of,
    stand_in,
    traffic_of,
)

log = logging.getLogger(__name__)

Tree = dict[str, Any]

PROCESS = "Python and programs"  # a CPU has them in the memory that arrays are in
_PROCESS_BYTES = 500_000_000  # a run of 270M held 0.55 GB besides its arrays before it compiled, and 0.63 GB after


@config
class Plan:
    """images: pictures that a row has. advise: whether the largest microbatch that fits is looked for."""

    is_dry: ClassVar[bool] = True  # needs no devices of the run's kind, no weights and no data

    images: int = 0
    advise: bool = True

    def __post_init__(self):
        require_range(self, "images", at_least=0)

    def __call__(self, cfg: DictConfig, folder: Path) -> dict[str, Any]:
        """Write plan.json, log the table, and return the numbers (bytes are of one device)."""
        s = settings(cfg)
        jax.config.update("jax_compilation_cache_dir", None)
        setup = self.setup(s, _mesh(s))
        need = self.need(s, setup)
        rows = setup.batch["row"].shape[0]
        run = setup.batch.get("joint_tokens", setup.batch["tokens"])  # a beginning that is shared is run once
        length, n_tokens = run.shape[-1], math.prod(run.shape)
        n_shards = s.hardware.n_row_shards
        n_microbatches = rows // s.algorithm.rows_at_once(setup.batch)
        limit, told = _limit(s)
        numbers = {
            "peak_bytes": need.peak,
            "update_peak_bytes": need.update_peak,
            "generation_peak_bytes": need.generation_peak,
            "limit_bytes": limit,
            "fits": need.peak <= limit,
            **{f"{name} bytes": size for name, size in need.parts.items()},
            "gradients bytes": need.gradients,
            "activations bytes": max(0, need.working - self._logits(s, setup, n_tokens // n_microbatches)),
            "logits chunk bytes": min(need.working, self._logits(s, setup, n_tokens // n_microbatches)),
            **{f"{name} bytes": size for name, size in need.generation.items()},
            "step_flops": flops_of(setup, n_tokens, length),
            "step_bytes": traffic_of(setup, need, n_microbatches),
            "tokens_per_step": n_tokens,
        }
        log.info("%s", _table(numbers, s, told, n_shards))
        if need.generation_peak > limit:
            self._tell_of_generation(s, setup, need)
        if self.advise:
            numbers["advice"] = self._advice(s, setup, need, limit)
        (folder / "plan.json").write_text(json.dumps(numbers, indent=1))
        return {name: value for name, value in numbers.items() if name != "advice"}

    def setup(self, s: Settings, mesh: Any) -> Setup:
        """The run's optimizer step as shapes."""
        h, architecture = s.hardware, s.model.architecture()
        model = Gemma3(architecture, stand_in(h.compute_dtype), h.remat, h.scan_layers, h.mesh.tensor == 1)
        if h.attention != "xla":
            log.info("hardware.attention=%s runs on its own devices only: attention is planned as xla", h.attention)
        trainable, frozen = _components(s)
        start = {name: tree for name, tree in trainable.items() if name != "adapter"}
        make = functools.partial(s.algorithm.components, load=lambda _: {**frozen, **trainable}, seed=s.seed)
        further = jax.eval_shape(make, {**frozen, **trainable})
        components = {**frozen, **trainable, **further}
        found = rehearse(s.algorithm, architecture, components, _max_length(s.dataset), s.sampling, h.n_row_shards)
        kept = start if keeps_reference(s.algorithm) or further else {}
        remembered = {f"remembered {name}": trainable[name] for name in found.remembers if name in trainable}
        n_rows = found.batch["row"].shape[0] // s.algorithm.minibatches
        batch = {
            name: jax.ShapeDtypeStruct((n_rows, *x.shape[1:]) if x.shape else (), x.dtype)
            for name, x in found.batch.items()
        } | self._pictures(s, n_rows, found.batch)
        if "adapter_dropout" in frozen:
            batch["noise"] = jax.ShapeDtypeStruct((n_rows,), jnp.uint32)
        return Setup(model, s.algorithm, trainable | further, frozen, {**kept, **remembered}, batch, mesh)

    def _pictures(self, s: Settings, n_rows: int, batch: Tree) -> Tree:
        vision = s.model.architecture().vision
        if not self.images or vision is None:
            return {}
        size = (n_rows, self.images, vision.image_size, vision.image_size, 3)
        tokens = {name: x for name, x in batch.items() if name in ("tokens", "joint_tokens")}
        soft = {
            name.replace("tokens", "soft_tokens"): jax.ShapeDtypeStruct((n_rows, *x.shape[1:]), jnp.int32)
            for name, x in tokens.items()
        }
        return {"images": jax.ShapeDtypeStruct(size, jnp.uint8), **soft}

    def need(self, s: Settings, setup: Setup) -> Need:
        """Bytes on a device, of the update and of generation, where the algorithm generates."""
        need = need_of(setup)
        beside = {PROCESS: _PROCESS_BYTES} if s.hardware.platform == "cpu" else {}
        return dataclasses.replace(need, parts=need.parts | beside, generation=self._generation(s, setup))

    def _generation(self, s: Settings, setup: Setup) -> dict[str, int]:
        if not s.algorithm.needs_reward:
            return {}
        a: Any = s.algorithm
        shape = shape_for(a.batch_size, a.group_size, _max_length(s.dataset), a.max_new_tokens, s.sampling.slots)
        kinds = {"weights": _float(s.sampling.weights), "cache_dtype": _float(s.sampling.cache_dtype)}
        return generation_of(setup, shape, **kinds)

    def _tell_of_generation(self, s: Settings, setup: Setup, need: Need) -> None:
        """What helps where generation does not fit, which no microbatch changes."""
        narrow = dataclasses.replace(s, sampling=dataclasses.replace(s.sampling, weights="int8"))
        peak = dataclasses.replace(need, generation=self._generation(narrow, setup)).generation_peak
        narrower = f"sampling.weights=int8 brings its peak to {peak / 1e9:.2f} GB; "
        log.info(
            "generation does not fit, whatever the microbatch: %sfewer sampling.slots take fewer keys and values",
            narrower if s.sampling.weights != "int8" else "",
        )

    def _logits(self, s: Settings, setup: Setup, n_tokens: int) -> int:
        return logits_bytes(setup, n_tokens // s.hardware.n_row_shards)

    def _advice(self, s: Settings, setup: Setup, need: Need, limit: float) -> dict[str, int | None]:
        """The largest microbatch that fits, for each setting of remat."""
        rows, shards = s.algorithm.rows_per_batch // s.algorithm.minibatches, s.hardware.n_row_shards
        fitting = [n for n in range(shards, rows + 1, shards) if rows % n == 0]
        if s.algorithm.needs_whole_batch:
            fitting = [rows]
        if sum(need.parts.values()) > limit:
            log.info("weights and optimizer alone are more than there is: no microbatch and no remat helps")
            return {"none": None, "block": None}
        known: dict[tuple[str, int], Need] = {(s.hardware.remat, s.algorithm.microbatch_size): need}

        def find(other: Setup) -> Need:
            key = (other.model.remat, other.algorithm.microbatch_size)
            if key not in known:
                again = self.setup(dataclasses.replace(s, algorithm=other.algorithm), setup.mesh)  # rows may be others
                known[key] = self.need(s, dataclasses.replace(other, batch=again.batch))
            return known[key]

        found = {}
        for remat in ("none", "block"):
            found[remat] = largest_microbatch(setup.with_remat(remat), limit, fitting, find)
            what = "nothing fits" if found[remat] is None else f"algorithm.microbatch_size up to {found[remat]} fits"
            log.info("hardware.remat=%s: %s (of %d rows in an optimizer step)", remat, what, rows)
        return found


def _max_length(data: Any) -> int:
    """Of the dataset, or of the longest of those that it mixes."""
    return data.max_length if hasattr(data, "max_length") else max(_max_length(one) for one in data.parts.values())


def _float(kind: str | None) -> str | None:
    return None if kind is None else kind if kind == "int8" else stand_in(kind)


def _components(s: Settings) -> tuple[Tree, Tree]:
    """(trained, frozen) components, as the run divides them."""
    m, h = s.model, s.hardware
    architecture, lora = m.architecture(), m.trained_lora
    parameters: Tree = Gemma3(architecture).abstract_components(stand_in(h.param_dtype))
    if lora is None:
        trained = {"model"} | ({"vision"} if m.train_vision else set())
        return (
            {name: tree for name, tree in parameters.items() if name in trained},
            {name: tree for name, tree in parameters.items() if name not in trained},
        )
    if m.base_quantisation is not None:
        kind, layers = m.base_quantisation, parameters["model"]["layers"]
        coded = {name: jax.eval_shape(functools.partial(quantise, name, kind=kind), x) for name, x in layers.items()}
        parameters["model"] = {**parameters["model"], "layers": coded}
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    parameters["adapter_scale"] = scalar
    if lora.dropout:
        parameters["adapter_dropout"] = scalar
    return {"adapter": abstract_adapter(architecture, lora)}, parameters


def _mesh(s: Settings) -> Any:
    """As many simulated devices as the run has; nothing else of this process may have started JAX with fewer."""
    m = s.hardware.mesh
    n_devices = m.data * m.fsdp * m.tensor
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(n_devices, 1))
    except RuntimeError:
        log.debug("JAX has started already, with %d devices", jax.device_count())
    return make_mesh(m.data, m.fsdp, m.tensor)


def _limit(s: Settings) -> tuple[float, str]:
    """(bytes that a device has for arrays, where the number comes from)."""
    h = s.hardware
    if h.memory_gb is not None:
        share = h.memory_fraction or (0.75 if h.platform == "gpu" else 1.0)
        return h.memory_gb * 1e9 * share, f"hardware.memory_gb={h.memory_gb:g} × {share:g}"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(total), "this machine's memory"


def _table(numbers: dict[str, Any], s: Settings, told: str, n_shards: int) -> str:
    from tabulate import tabulate

    sizes = [
        (name.removesuffix(" bytes"), f"{value / 1e9:.3f}")
        for name, value in numbers.items()
        if name.endswith(" bytes")
    ]
    peaks = [("peak of the update", f"{numbers['update_peak_bytes'] / 1e9:.3f}")]
    if numbers["generation_peak_bytes"]:
        peaks.append(("peak of generation", f"{numbers['generation_peak_bytes'] / 1e9:.3f}"))
    verdict = "fits" if numbers["fits"] else "does not fit"
    lines = [
        f"{type(s.algorithm).__name__}, {s.algorithm.microbatch_size} rows at once over {n_shards} parts, "
        f"{numbers['tokens_per_step']} tokens a step; on each device:",
        tabulate([*sizes, *peaks], ["of", "GB"], disable_numparse=True, colalign=("left", "right")),
        f"predicted peak {numbers['peak_bytes'] / 1e9:.2f} GB of {numbers['limit_bytes'] / 1e9:.2f} GB ({told}): "
        f"{verdict}",
        f"{numbers['step_flops'] / 1e12:.2f} TFLOP and at least {numbers['step_bytes'] / 1e9:.1f} GB moved in a step",
    ]
    return "\n" + "\n".join(lines)
