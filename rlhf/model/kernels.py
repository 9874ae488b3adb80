"""Attention by kernels that an accelerator's vendor wrote, in place of `rlhf.model.attention`, which is the reference.

    cudnn   flash attention of cuDNN, through `jax.nn.dot_product_attention`; bfloat16, NVIDIA GPUs
    splash  splash attention of JAX, a Pallas kernel; TPUs

Both leave out the blocks of keys that no query of a block sees, so a local layer costs its window. Places of a row are
taken for positions, as tokens of a segment are neighbours. A padding token sees padding, whose results nobody reads.
They serve training and scoring of whole rows; generation has attention of its own.
"""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool

from rlhf.errors import ConfigError
from rlhf.model import attention
from rlhf.model.attention import Mix, Places

log = logging.getLogger(__name__)

Kind = Literal["xla", "cudnn", "splash"]
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
_LANES = 128  # of a TPU's vector unit: blocks of keys are multiples of it


def mixer(kind: str, places: Places, window: int, mesh: Mesh | None = None) -> Mix:
    """The attention of a model whose local layers see `window` tokens, by one of `Kind`.

    mesh: over which rows and heads are split; each device runs the kernel on its own.
    """
    if kind == "splash" and (places.prefixes is not None or places.images is not None):
        joint = "a shared beginning (dataset.share_prompt=false avoids it)"
        _say_once("images" if places.images is not None else joint)
        kind = "xla"
    if kind == "xla":
        return attention.mixer(places, window)
    make = cudnn if kind == "cudnn" else splash
    return make(places, window) if mesh is None else _spread(make, places, window, mesh)


@functools.cache
def _say_once(what: str) -> None:
    log.warning("rows with %s run as hardware.attention=xla: splash knows no mask for them", what)


def require(kind: str, compute_dtype: str, head_width: int = 0) -> None:
    """Whether the kernel runs on the devices of this process. head_width: 0 where it is not known yet.

    Raises:
        ConfigError: another platform or type, or heads that are too wide for the GPU.
    """
    if kind == "xla":
        return
    device = jax.devices()[0]
    if device.platform != PLATFORMS[kind]:
        raise ConfigError(
            f"hardware.attention={kind} is a kernel for a {PLATFORMS[kind].upper()}, but JAX runs on {device.platform} "
            "here: choose hardware.attention=xla"
        )
    if kind == "splash":
        return
    if compute_dtype != "bfloat16":
        raise ConfigError(
            f"hardware.attention=cudnn computes in bfloat16 only, hardware.compute_dtype is {compute_dtype}: choose "
            "hardware.compute_dtype=bfloat16 or hardware.attention=xla"
        )
    widest = 256 if float(device.compute_capability) >= 9 else 128
    if head_width > widest:
        raise ConfigError(
            f"hardware.attention=cudnn takes heads of at most {widest} on {device.device_kind}, model.head_width is "
            f"{head_width}: choose hardware.attention=xla"
        )


def _spread(make: Any, places: Places, window: int, mesh: Mesh) -> Mix:
    """A kernel on every device, each with its rows and heads; what can't be divided, each device does whole."""
    n_rows, n_tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]

    def mix(queries: Array, keys: Array, values: Array, is_global: Any) -> Array:
        rows = ("data", "fsdp") if queries.shape[0] % n_rows == 0 else None
        heads = "tensor" if keys.shape[2] % n_tensor == 0 else None
        part, known = PartitionSpec(rows, None, heads, None), isinstance(is_global, bool)

        def run(arrays: tuple, flag: Any, *inputs: Array) -> Array:
            return make(Places(*arrays)._replace(image_tokens=places.image_tokens), window)(
                *inputs, is_global if known else flag
            )

        specs = (PartitionSpec(rows), PartitionSpec(), part, part, part)
        each = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=part, check_vma=False)
        return each(tuple(places[:4]), jnp.asarray(is_global), queries, keys, values)

    return mix


def cudnn(places: Places, window: int, implementation: Literal["cudnn", "xla"] = "cudnn") -> Mix:
    """`jax.nn.dot_product_attention`: causal and window as its arguments, which let it leave out keys; what those can't
    say as a mask of rows × time × time, which it adds to the scores. That is segments only, but all of it in rows with
    images or a shared beginning: there every layer meets all keys.

    implementation: `xla` runs everywhere, with the same arguments (slowly: for tests).
    """
    n_more = places.positions.shape[1] % 2  # with a mask, the backward pass takes even lengths only
    is_plain = places.prefixes is None and places.images is None
    places = places.each(lambda x: jnp.pad(x, ((0, 0), (0, n_more))))
    both = places.segments[:, :, None] == places.segments[:, None, :]
    is_padding = both & (places.segments == 0)[:, :, None]  # no query without any key

    def run(queries: Array, keys: Array, values: Array, is_global: bool) -> Array:
        seen: Bool[Array, "batch time time"] = both
        if not is_plain:
            seen = places.mask(None if is_global else window) | is_padding
        reach = (window - 1, 0) if is_plain and not is_global else None
        widths = ((0, 0), (0, n_more), (0, 0), (0, 0))
        queries, keys, values = (jnp.pad(x, widths) for x in (queries, keys, values))
        mixed = jax.nn.dot_product_attention(
            queries, keys, values, mask=seen[:, None], scale=1.0, is_causal=is_plain, local_window_size=reach,
            implementation=implementation,
        )  # fmt: skip
        return mixed[:, : mixed.shape[1] - n_more]

    return _for_both(run)


def splash(places: Places, window: int, block: int = 512) -> Mix:
    """Splash attention; rows without images and shared beginnings only. On other platforms than TPU it is interpreted.

    block: tokens of queries and of keys at a time, a multiple of 128; shorter rows are one block.
    """
    n_time = places.positions.shape[1]
    block = min(block, -(-n_time // _LANES) * _LANES)
    n_more = -n_time % block

    def run(queries: Array, keys: Array, values: Array, is_global: bool) -> Array:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        kernel = _splash_kernel(queries.shape[2], n_time + n_more, None if is_global else window, block)
        widths = ((0, 0), (0, n_more), (0, 0), (0, 0))
        by_head = (jnp.pad(x, widths).swapaxes(1, 2) for x in (queries, keys, values))
        segments = jnp.pad(places.segments, ((0, 0), (0, n_more)))
        mixed = jax.vmap(kernel)(*by_head, SegmentIds(segments, segments))
        return mixed.swapaxes(1, 2)[:, :n_time]

    return _for_both(run)


def _splash_kernel(heads: int, time: int, window: int | None, block: int) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    shape = (time, time)
    mask = kernels.CausalMask(shape) if window is None else kernels.LocalMask(shape, (window - 1, 0), 0)
    names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")  # fused, dq would be one array for each block of keys
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    sizes = kernels.BlockSizes(**blocks)
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="mixed",  # as the reference names it: kept for the backward pass by `remat=none`
        interpret=jax.default_backend() != "tpu",
    )


def _for_both(run: Any) -> Mix:
    """A function of a known flag, for a layer whose kind is data too: only that branch runs."""

    def mix(queries: Array, keys: Array, values: Array, is_global: Any) -> Array:
        if isinstance(is_global, bool | np.bool_):
            return run(queries, keys, values, bool(is_global))
        inputs = (queries, keys, values)
        return jax.lax.cond(is_global, lambda *x: run(*x, True), lambda *x: run(*x, False), *inputs)

    return mix
