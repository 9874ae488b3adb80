"""The reference implementation's tiny models as ours: architecture, parameters and the numbers to compare with."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rlhf.model.gemma3 import Architecture


def load_reference(folder: Path) -> tuple[Architecture, dict, dict]:
    """Architecture, parameters, and `expected.npz`."""
    a = fixture_architecture(json.loads((folder / "config.json").read_text()))
    expected = dict(np.load(folder / "expected.npz"))
    return a, fixture_parameters(load_file(folder / "model.safetensors"), a), expected


def fixture_architecture(config: dict) -> Architecture:
    rope = config["rope_parameters"]
    return Architecture(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        ff_width=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config["head_dim"],
        query_scale=config["query_pre_attn_scalar"] ** -0.5,
        window=config["sliding_window"],
        rope_scale=rope["full_attention"].get("factor", 1.0),
    )


def fixture_parameters(arrays: dict, a: Architecture) -> dict:
    """The reference's per-layer matrices [out, in] as our stacked arrays [layers, in, out…]."""

    def stack(name, shape=None):
        each = [arrays[f"model.layers.{i}.{name}.weight"] for i in range(a.layers)]
        return np.stack([x if shape is None else x.T.reshape(shape) for x in each])

    d, h, q, k, f = a.width, a.head_width, a.heads, a.kv_heads, a.ff_width
    keys, values = (stack(f"self_attn.{n}_proj", (d, k, h)) for n in "kv")
    gate, up = (stack(f"mlp.{n}_proj", (d, f)) for n in ("gate", "up"))
    layers = {
        "attention_norm": stack("input_layernorm"),
        "query": stack("self_attn.q_proj", (d, q, h)),
        "key_value": np.stack([keys, values], axis=2),
        "query_norm": stack("self_attn.q_norm"),
        "key_norm": stack("self_attn.k_norm"),
        "out": stack("self_attn.o_proj", (q, h, d)),
        "post_attention_norm": stack("post_attention_layernorm"),
        "mlp_norm": stack("pre_feedforward_layernorm"),
        "gate_up": np.stack([gate, up], axis=2),
        "down": stack("mlp.down_proj", (f, d)),
        "post_mlp_norm": stack("post_feedforward_layernorm"),
    }
    tree = {
        "embedding": arrays["model.embed_tokens.weight"],
        "layers": layers,
        "final_norm": arrays["model.norm.weight"],
    }
    return {"model": jax.tree.map(jnp.asarray, tree)}
