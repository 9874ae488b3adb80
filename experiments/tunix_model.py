"""A size as a model of Tunix with random float32 weights."""

import jax.numpy as jnp
from flax import nnx
from size import ROPE_BASE_GLOBAL, ROPE_BASE_LOCAL, Size
from tunix.models.gemma3.model import Gemma3, ModelConfig


def new_model(size: Size) -> Gemma3:
    config = ModelConfig(
        num_layers=size.layers,
        num_embed=size.vocab,
        embed_dim=size.width,
        hidden_dim=size.ff_width,
        num_heads=size.heads,
        head_dim=size.head_width,
        num_kv_heads=size.kv_heads,
        sliding_window_size=size.window,
        local_base_frequency=int(ROPE_BASE_LOCAL),
        global_base_frequency=int(ROPE_BASE_GLOBAL),
        param_dtype=jnp.float32,
    )
    return Gemma3(config, rngs=nnx.Rngs(0))
