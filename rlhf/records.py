"""What a run says about itself: its stored config, the differences that forbid going on, and the opening summary."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from omegaconf import DictConfig, OmegaConf

from rlhf import processes
from rlhf.errors import FolderInUse
from rlhf.model.quantised import n_parameters

CONFIG_FILE = "config.json"

# settings that a run may change when it goes on: how it is watched and where it runs, not what it computes
_FREE = (
    "name", "resume", "task", "pipeline", "evaluation", "hardware.compilation_cache", "hardware.platform",
    "hardware.visible_devices", "hardware.memory_fraction", "hardware.processes", "hardware.forbid_recompile",
    "hardware.memory_gb",
    "trainer.log_every", "trainer.eval_every", "trainer.eval_rows", "trainer.checkpoint_every", "trainer.max_to_keep",
    "trainer.allow_older_checkpoint", "trainer.samples_every", "trainer.n_samples", "trainer.on_nonfinite",
    "trainer.best_metric", "trainer.best_is",
    "model.download_timeout",
)  # fmt: skip


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The config with every reference filled in."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def store_config(folder: Path, cfg: DictConfig) -> None:
    if not processes.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(resolved(cfg), indent=1), encoding="utf-8")
    partial.replace(folder / CONFIG_FILE)


def keep(path: Path, copy: Path) -> None:
    """Copy a file that the run needs again into its folder, unless it is there."""
    if not processes.is_first():
        return
    if not copy.is_file() or copy.read_bytes() != path.read_bytes():
        partial = copy.with_name(f"{copy.name}.partial")
        shutil.copyfile(path, partial)
        partial.replace(copy)


def stored_config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def require_same_run(stored: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings where they would change the result.

    Raises:
        FolderInUse: lists each key with its old and its new value.
    """
    before, after = flatten(stored), flatten(now)
    changed = [k for k in sorted({*before, *after}) if before.get(k) != after.get(k) and not _is_free(k)]
    changed = [k for k in changed if not _moved_along(before.get(k), after.get(k), folder)]
    if changed:
        lines = [f"  {k}: {before.get(k, '(not set)')} in the run, {after.get(k, '(not set)')} now" for k in changed]
        raise FolderInUse("\n".join([f"{folder} can't go on with other settings:", *lines]))


def _moved_along(before: Any, after: Any, folder: Path) -> bool:
    """Whether a setting names a folder that lay beside the run's and was moved with it, as a pipeline's stages are."""
    if not (isinstance(before, str) and isinstance(after, str) and os.path.isabs(before) and os.path.isabs(after)):
        return False
    old, new = Path(before), Path(after)
    is_beside = new.name == old.name and new.parent.resolve() == folder.parent.resolve()
    return is_beside and not (old.parent / folder.name).exists()


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of a nested config."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, node in tree.items() for k, v in flatten(node, f"{prefix}.{name}".lstrip(".")).items()}


def batch_arithmetic(algorithm: Any, n_rows: int, n_steps: int) -> str:
    """How rows become optimizer steps, in one line."""
    a = algorithm
    rows = {"preference": "pairs", "prompt": "prompts"}.get(a.form, "rows")
    per_update = a.rows_per_batch // a.minibatches
    updates = a.epochs * a.minibatches
    many, epochs = a.rows_per_batch // a.batch_size, f"{a.epochs} epochs of " if a.epochs > 1 else ""
    samples = f" × {many} samples = {a.rows_per_batch} sequences" if many > 1 else ""
    return (
        f"{a.batch_size} {rows} a step{samples} = {epochs}{a.minibatches} minibatch{'es' if a.minibatches > 1 else ''} "
        f"× {per_update // a.microbatch_size} microbatch{'es' if per_update > a.microbatch_size else ''} of "
        f"{a.microbatch_size}; {updates} optimizer step{'s' if updates > 1 else ''} a step; {n_steps:,} steps over "
        f"{n_rows:,} {rows} ({n_steps * a.batch_size / n_rows:.2f} epochs)"
    )


def _percent(share: float) -> str:
    return f"{share:.0%}" if share > 0.1 else f"{share:.2%}"


def summary(job: Any) -> list[str]:
    """The opening lines of a run: batch arithmetic, sizes, devices."""

    trained, fixed = n_parameters(job.trainable), n_parameters(job.frozen)
    share = trained / (trained + fixed)
    devices = jax.devices()
    used = 1 if job.mesh is None else job.mesh.size
    shape = "" if job.mesh is None else " as " + " × ".join(f"{n} {axis}" for axis, n in job.mesh.shape.items())
    n_steps = job.settings.n_steps(job.batches.n_rows, job.algorithm.batch_size)
    return [
        batch_arithmetic(job.algorithm, job.batches.n_rows, n_steps),
        f"model: {trained + fixed:,} parameters, {trained:,} trained ({_percent(share)}); in {job.model.compute_dtype}",
        f"devices: {used} of {len(devices)} × {devices[0].device_kind} ({devices[0].platform}){shape}",
        f"folder: {job.folder}",
    ]
