"""Devices, number types, and what to trade memory for. Read before JAX starts its backend."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import jax

from rlhf.config import config, require_range
from rlhf.errors import ConfigError
from rlhf.model import kernels
from rlhf.model.gemma3 import Architecture, Gemma3
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
class Processes:
    """Several processes, on one or several machines, as one run (docs/hardware.md).

    count: processes. number: of this one, from 0. coordinator: host:port of process 0. timeout_seconds: after which one
    that does not come, or gives no sign of life, counts as gone.
    """

    count: int
    number: int | None = None
    coordinator: str | None = None
    timeout_seconds: float = 60.0

    def __post_init__(self):
        require_range(self, "count", at_least=1)
        require_range(self, "number", at_least=0, at_most=self.count - 1)
        require_range(self, "timeout_seconds", at_least=3)
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise ConfigError(f"coordinator={self.coordinator!r} of Processes must be HOST:PORT")


@config
class Hardware:
    """See conf/hardware for the meaning of each key."""

    mesh: Mesh = Mesh()
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    remat: Literal["none", "block"] = "none"
    scan_layers: bool = True
    attention: kernels.Kind = "xla"
    compilation_cache: str | None = None
    visible_devices: tuple[int, ...] | None = None
    memory_fraction: float | None = None
    memory_gb: float | None = None
    processes: Processes | None = None
    forbid_recompile: bool = False

    def __post_init__(self):
        for name in ("param_dtype", "compute_dtype"):
            if getattr(self, name) == "float16":
                raise ConfigError(
                    f"{name}=float16: Gemma 3's activations reach hundreds of thousands and overflow float16 "
                    "(largest number 65,504); use bfloat16 or float32"
                )
        require_range(self, "memory_fraction", above=0, at_most=1)
        require_range(self, "memory_gb", above=0)
        if self.visible_devices is not None and (
            not self.visible_devices
            or min(self.visible_devices) < 0
            or len(set(self.visible_devices)) < len(self.visible_devices)
        ):
            raise ConfigError(
                f"visible_devices={list(self.visible_devices)} must be numbers of devices, each once; null for all"
            )

    def model(self, architecture: Architecture, mesh: Any) -> Gemma3:
        """The model as this hardware runs it.

        Raises:
            ConfigError: `attention` is a kernel that doesn't run here.
        """
        kernels.require(self.attention, self.compute_dtype, architecture.head_width)
        one_each = self.mesh.tensor == 1
        return Gemma3(
            architecture, self.compute_dtype, self.remat, self.scan_layers, one_each, self.attention,
            None if self.attention == "xla" else mesh,
        )  # fmt: skip

    @property
    def n_row_shards(self) -> int:
        """Parts into which the rows of a batch are split."""
        return self.mesh.data * self.mesh.fsdp

    def start(self) -> Any:
        """Configure JAX and make the mesh (None for one device). Call before the first array is made.

        Raises:
            ConfigError: no such platform here, fewer devices than the mesh needs, or a kernel of another device.
        """
        self._keep_programs()
        self._choose_devices()
        if _runs_on_cpu(self.platform):
            prepare_processor(keep_memory=self.remat == "none")
        if self.platform is not None:
            self._require_platform(self.platform)
        if self.processes is not None:
            self._require_all_devices()
        kernels.require(self.attention, self.compute_dtype)
        return make_mesh(self.mesh.data, self.mesh.fsdp, self.mesh.tensor)

    def _require_all_devices(self) -> None:
        """A process without a part of the mesh would have nothing to do."""
        wanted, n_there = self.mesh.data * self.mesh.fsdp * self.mesh.tensor, len(jax.devices())
        if wanted != n_there:
            raise ConfigError(
                f"hardware.mesh=({self.mesh.data} data × {self.mesh.fsdp} fsdp × {self.mesh.tensor} tensor) needs "
                f"{wanted} devices; the {jax.process_count()} processes have {n_there}, and all must be used"
            )

    def _keep_programs(self) -> None:
        """Compiled programs outlive the process, in a folder."""
        if self.compilation_cache is None:
            jax.config.update("jax_compilation_cache_dir", None)
            return
        folder = Path(os.path.expanduser(self.compilation_cache))
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def _choose_devices(self) -> None:
        """Which devices JAX will see and how much of their memory it takes: read when it starts them, and only then."""
        global _chosen
        numbers = ",".join(map(str, self.visible_devices or ()))
        if numbers and _runs_on_cpu(self.platform):
            raise ConfigError(
                f"hardware.visible_devices=[{numbers}]: a CPU has no devices to choose from; "
                "XLA_FLAGS=--xla_force_host_platform_device_count=N simulates several"
            )
        wanted = (self.visible_devices, self.memory_fraction)
        if _chosen is not None and _chosen != wanted:
            raise ConfigError(
                f"hardware.visible_devices and memory_fraction are {wanted} here, but this process began with "
                f"{_chosen}: JAX reads them once, so runs that differ in them can't be jobs of one sweep"
            )
        _chosen = wanted
        if self.memory_fraction is not None:
            os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # its old name: JAX refuses to be given both
            os.environ["XLA_CLIENT_MEM_FRACTION"] = str(self.memory_fraction)
        if self.visible_devices is None:
            return
        jax.config.update("jax_cuda_visible_devices", numbers)
        os.environ["TPU_VISIBLE_CHIPS"] = numbers

    def _require_platform(self, platform: str) -> None:
        if platform == "cpu":
            jax.config.update("jax_platforms", "cpu")
        found = jax.devices()[0].platform
        if found != platform:
            raise ConfigError(
                f"hardware.platform={platform}, but JAX runs on {found} here; install the extra for it "
                f"(pip install 'rlhf[{'cuda' if platform == 'gpu' else platform}]') or choose hardware=cpu"
            )


_chosen: tuple | None = None  # what this process began with


def _runs_on_cpu(platform: str | None) -> bool:
    """Whether JAX will, as far as can be told without starting it."""
    asked = platform or os.environ.get("JAX_PLATFORMS")
    if asked:
        return asked == "cpu"
    return not any(importlib.util.find_spec(plugin) for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu"))
