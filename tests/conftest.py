"""Settings that make mistakes loud, and the places of test data."""

import contextlib
import gc
import io
import logging
import os
import sys

os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",  # meshes without accelerators
        "--xla_backend_optimization_level=0",  # most of the time goes into compiling
        "--xla_cpu_use_fusion_emitters=false",  # whose set-up is half the time of a small program
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path
from typing import NamedTuple

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # (B,) - (B, 1) is an error, not a (B, B) array
jax.devices()  # all eight, from now on: a plan that comes first would start JAX with as many as it needs

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    """Slow tests first: at the end, one of them would leave the other processes with nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """Look for garbage less often, and not in what was imported."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference numbers and slices of public data that lie beside the checkout, not in it."""
    if not (SHARED / "fixtures").is_dir():
        pytest.skip("needs the folder `shared` beside the checkout (reference numbers and data slices)")
    return SHARED


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`rlhf` as a user runs it, in this process and a folder of its own: words in, (exit code, output) out."""
    import absl.logging

    from rlhf.run import cli

    # Hydra closes every log handler before a run: this one would close what pytest catches stderr in.
    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["rlhf", *map(str, words), *QUICK_START])
        printed, code = io.StringIO(), 0
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                cli()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
                print(end.code if isinstance(end.code, str) else "")
        return Finished(code, printed.getvalue())

    yield run
    for handler in logging.getLogger().handlers[:]:  # those that Hydra put there write into a closed stream
        if not type(handler).__module__.startswith("_pytest"):
            logging.getLogger().removeHandler(handler)
            handler.close()


class Finished(NamedTuple):
    code: int
    output: str


# no program cache in the user's home
QUICK_START = ("hardware.compilation_cache=null",)

# a run of few small steps
SMALL = (
    "model.width=32", "model.ff_width=48", "model.heads=2", "model.kv_heads=1", "model.head_width=16", "model.layers=2",
    "model.pattern=2", "dataset.n_train=48", "dataset.n_eval=16", "trainer.eval_rows=8", "evaluation.rows=4",
    "evaluation.max_new_tokens=4", "algorithm.batch_size=4", "algorithm.microbatch_size=4", "trainer.max_steps=2",
)  # fmt: skip


@pytest.fixture
def small() -> tuple[str, ...]:
    """Overrides for a run of two small steps on the embedded data."""
    return SMALL
