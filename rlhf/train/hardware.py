"""Devices, number types, and what to trade memory for. Read before JAX starts its backend."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import jax

from rlhf.config import config, require_range
from rlhf.errors import ConfigError
from rlhf.model.sharding import make_mesh
from rlhf.train.processor import prepare_processor

Dtype = Literal["float32", "bfloat16", "float16"]  # the last is refused with the reason


@config
class Mesh:
    """How many ways each thing is split. data, fsdp: rows; fsdp: parameters too; tensor: heads, columns, vocabulary."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in ("data", "fsdp", "tensor"):
            require_range(self, name, at_least=1)


@config
class Hardware:
    """See conf/hardware for the meaning of each key."""

    mesh: Mesh = Mesh()
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    remat: Literal["none", "block"] = "none"
    scan_layers: bool = True
    compilation_cache: str | None = None

    def __post_init__(self):
        for name in ("param_dtype", "compute_dtype"):
            if getattr(self, name) == "float16":
                raise ConfigError(
                    f"{name}=float16: Gemma 3's activations reach hundreds of thousands and overflow float16 "
                    "(largest number 65,504); use bfloat16 or float32"
                )

    @property
    def n_row_shards(self) -> int:
        """Parts into which the rows of a batch are split."""
        return self.mesh.data * self.mesh.fsdp

    def start(self) -> Any:
        """Configure JAX and make the mesh (None for one device). Call before the first array is made.

        Raises:
            ConfigError: no such platform here, or fewer devices than the mesh needs.
        """
        if self.compilation_cache is not None:
            folder = Path(os.path.expanduser(self.compilation_cache))
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        if _runs_on_cpu(self.platform):
            prepare_processor()
        if self.platform is not None:
            self._require_platform(self.platform)
        return make_mesh(self.mesh.data, self.mesh.fsdp, self.mesh.tensor)

    def _require_platform(self, platform: str) -> None:
        if platform == "cpu":
            jax.config.update("jax_platforms", "cpu")
        found = jax.devices()[0].platform
        if found != platform:
            raise ConfigError(
                f"hardware.platform={platform}, but JAX runs on {found} here; install the extra for it "
                f"(pip install 'rlhf[{'cuda' if platform == 'gpu' else platform}]') or choose hardware=cpu"
            )


def _runs_on_cpu(platform: str | None) -> bool:
    """Whether JAX will, as far as can be told without starting it."""
    asked = platform or os.environ.get("JAX_PLATFORMS")
    if asked:
        return asked == "cpu"
    return not any(importlib.util.find_spec(plugin) for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu"))
