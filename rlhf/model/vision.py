"""SigLIP, as Gemma 3 uses it: a picture in, its soft tokens out, each as wide as the text model.

The parameters are the component `vision` beside `model`, with the layers stacked and scanned like those of the text
model. Patches, blocks with LayerNorm before each part, a final norm (Zhai et al., 2023, section 3; Dosovitskiy et al.,
2021, eq. 1-4); then a mean over squares of patches, RMSNorm and a projection (Gemma Team, 2025, section 2.1).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from rlhf.model.layers import project, rms_norm
from rlhf.model.random_arrays import normal

Tree = dict[str, Any]

QUERIES = 512  # patches whose attention scores are in memory at once: all 4096 × 4096 of 16 heads would be 1 GB
PATCHES = 16_384  # patches that run through the tower at once: four pictures of 896 × 896


@dataclasses.dataclass(frozen=True)
class Vision:
    """The numbers that make a SigLIP tower.

    image_size: pixels of a picture's sides. patch: pixels of a patch's sides.
    tokens_per_image: soft tokens that a picture becomes; each is the mean of a square of patches.
    """

    image_size: int
    patch: int
    width: int
    ff_width: int
    layers: int
    heads: int
    tokens_per_image: int
    eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch

    def shapes(self, text_width: int) -> Tree:
        """Shape of every parameter; the tree is the tree of the parameters."""
        w, f, h = self.width, self.ff_width, self.heads
        layer = {
            "attention_norm_scale": (w,),
            "attention_norm_bias": (w,),
            "query_key_value": (w, 3, h, w // h),
            "query_key_value_bias": (3, h, w // h),
            "out": (h, w // h, w),
            "out_bias": (w,),
            "mlp_norm_scale": (w,),
            "mlp_norm_bias": (w,),
            "up": (w, f),
            "up_bias": (f,),
            "down": (f, w),
            "down_bias": (w,),
        }
        return {
            "patch_kernel": (self.patch, self.patch, 3, w),
            "patch_bias": (w,),
            "position": (self.grid**2, w),
            "layers": {name: (self.layers, *shape) for name, shape in layer.items()},
            "final_norm_scale": (w,),
            "final_norm_bias": (w,),
            "soft_norm": (w,),
            "project": (w, text_width),
        }

    def abstract(self, text_width: int, dtype: str = "float32") -> Tree:
        """Shapes and types of the parameters, without memory."""
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
            self.shapes(text_width),
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def initialise(self, text_width: int, seed: int, dtype: str = "float32") -> Tree:
        """Random parameters, on the host: matrices N(0, 1 / fan-in), positions N(0, 0.02²), biases 0, scales of
        LayerNorm 1."""
        fan_in = {"patch_kernel": 3 * self.patch**2, "down": self.ff_width}
        deviations = {"position": 0.02} | {name: n**-0.5 for name, n in fan_in.items()}

        def draw(path, leaf):
            name = path[-1].key
            if name.endswith(("bias", "soft_norm")):
                return np.zeros(leaf.shape, leaf.dtype)
            if name.endswith("scale"):
                return np.ones(leaf.shape, leaf.dtype)
            return normal(seed, f"vision {name}", leaf.shape, deviations.get(name, self.width**-0.5), dtype)

        return jax.tree_util.tree_map_with_path(draw, self.abstract(text_width, dtype))


def image_ids(soft_tokens: Int[Array, "*rows time"], tokens_per_image: int) -> Int[Array, "*rows time"]:
    """Which picture of its row a token is part of, counted from 1; 0 for text."""
    return -(-soft_tokens // tokens_per_image)


def soft_features(
    params: Tree,
    images: UInt8[Array, "rows slots size size 3"] | Float[Array, "rows slots size size 3"],
    vision: Vision,
    compute_dtype: str = "float32",
) -> Float[Array, "rows soft text_width"]:
    """The soft tokens of the pictures of each row, one picture behind the other, in the text model's width.

    images: bytes, which are scaled to [-1, 1] here, or numbers that are so already.
    """
    rows, slots = images.shape[:2]
    each = _in_parts(partial(_picture, params, vision, compute_dtype), images.reshape(-1, *images.shape[2:]), vision)
    return each.reshape(rows, slots * vision.tokens_per_image, each.shape[-1])


def _in_parts(run: Any, images: Array, vision: Vision) -> Array:
    """A few pictures at a time, so that memory does not grow with their number.

    Part i has the pictures i, i + n, i + 2 n …: rows that are spread over devices stay spread in each part.
    """
    at_once = max(1, PATCHES // vision.grid**2)
    n_images = images.shape[0]
    n_parts = -(-n_images // at_once)
    while n_images % n_parts:
        n_parts += 1
    if n_parts == 1:
        return run(images)
    parts = images.reshape(-1, n_parts, *images.shape[1:]).swapaxes(0, 1)
    done = jax.lax.map(jax.checkpoint(run), parts)
    return done.swapaxes(0, 1).reshape(n_images, *done.shape[2:])


def _picture(params: Tree, vision: Vision, compute_dtype: str, images: Array) -> Float[Array, "n soft text_width"]:
    patches = encode_patches(params, images, vision, compute_dtype)
    pooled = pool(patches, vision)
    normed = rms_norm(pooled, params["soft_norm"], vision.eps)
    return project(normed, params["project"].astype(compute_dtype))


def encode_patches(
    params: Tree, images: Array, vision: Vision, compute_dtype: str = "float32"
) -> Float[Array, "n patches width"]:
    """The tower's output after its final norm, one vector a patch, row by row of the picture."""
    pixels = images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images
    n, g, p = images.shape[0], vision.grid, vision.patch
    cut = pixels.astype(compute_dtype).reshape(n, g, p, g, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, g * g, -1)
    kernel = params["patch_kernel"].astype(compute_dtype).reshape(-1, vision.width)
    x = _plus(project(cut, kernel), params["patch_bias"])
    x += params["position"].astype(compute_dtype)[None]

    run = jax.checkpoint(partial(_block, vision, compute_dtype))  # keeps its input: scores of 27 layers would be 29 GB
    x, _ = jax.lax.scan(lambda x, layer: (run(x, layer), None), x, params["layers"])
    return _layer_norm(x, params["final_norm_scale"], params["final_norm_bias"], vision.eps)


def pool(patches: Float[Array, "n patches width"], vision: Vision) -> Float[Array, "n soft width"]:
    """The mean over each square of patches; the squares row by row."""
    n, _, width = patches.shape
    side = round(vision.tokens_per_image**0.5)
    square = vision.grid // side
    grid = patches.astype(jnp.float32).reshape(n, side, square, side, square, width)
    return grid.mean(axis=(2, 4)).reshape(n, side * side, width).astype(patches.dtype)


def _block(vision: Vision, compute_dtype: str, x: Array, layer: Tree) -> Array:
    """Dosovitskiy et al., 2021, eq. 2 and 3."""
    layer = jax.tree.map(lambda w: w.astype(compute_dtype), layer)
    normed = _layer_norm(x, layer["attention_norm_scale"], layer["attention_norm_bias"], vision.eps)
    mixed = _plus(project(normed, layer["query_key_value"]), layer["query_key_value_bias"])
    queries, keys, values = (mixed[:, :, i] for i in range(3))
    attended = _attend(queries * (vision.width // vision.heads) ** -0.5, keys, values)
    x += _plus(project(attended.reshape(x.shape), layer["out"].reshape(-1, vision.width)), layer["out_bias"])
    normed = _layer_norm(x, layer["mlp_norm_scale"], layer["mlp_norm_bias"], vision.eps)
    raised = jax.nn.gelu(_plus(project(normed, layer["up"]), layer["up_bias"]), approximate=True)
    return x + _plus(project(raised, layer["down"]), layer["down_bias"])


def _plus(x: Float[Array, "n patches *out"], bias: Float[Array, "*out"]) -> Float[Array, "n patches *out"]:
    return x + bias.astype(x.dtype)[None, None]


def _attend(
    queries: Float[Array, "n patches heads head_width"],
    keys: Float[Array, "n patches heads head_width"],
    values: Float[Array, "n patches heads head_width"],
) -> Float[Array, "n patches heads head_width"]:
    """Every patch sees every patch, with a float32 softmax; some queries at a time, whose scores are made again in the
    backward pass."""

    def mix(some):
        scores = jnp.einsum("nqhd,nkhd->nhqk", some, keys, preferred_element_type=jnp.float32)
        return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores, axis=-1).astype(values.dtype), values)

    n, n_patches, heads, width = queries.shape
    if n_patches <= QUERIES or n_patches % QUERIES:
        return mix(queries)
    parts = queries.reshape(n, n_patches // QUERIES, QUERIES, heads, width).swapaxes(0, 1)
    return jax.lax.map(jax.checkpoint(mix), parts).swapaxes(0, 1).reshape(queries.shape)


def _layer_norm(x: Float[Array, "... width"], scale: Float[Array, "width"], bias: Float[Array, "width"], eps: float):
    """(x - mean) / deviation · scale + bias, computed in float32, returned in x's type (Ba et al., 2016, eq. 4)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return (normed * scale.astype(jnp.float32).reshape(shape) + bias.astype(jnp.float32).reshape(shape)).astype(x.dtype)


def pictures_of(batch: Tree, name: str) -> tuple[Array | None, Array | None]:
    """Soft tokens as rows [rows, time], and the images that they are of; nothing of a batch without images."""
    if "images" not in batch:
        return None, None
    soft_tokens = jnp.asarray(batch[name])
    return soft_tokens.reshape(-1, soft_tokens.shape[-1]), jnp.asarray(batch["images"])
