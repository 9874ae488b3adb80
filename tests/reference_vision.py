"""The reference implementations' tiny models with images as ours: parameters, and the numbers to compare with."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from reference_models import fixture_architecture, fixture_parameters
from safetensors.numpy import load_file

from rlhf.model.gemma3 import Architecture
from rlhf.model.vision import Vision

# our name -> theirs, inside a layer
_NORMS = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
_MATRICES = {"out": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}


def load_torch_form(folder: Path) -> tuple[Architecture, dict, dict]:
    """Architecture, parameters, and `expected.npz` of the safetensors fixture."""
    config, arrays = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    tower = config["vision_config"]
    vision = Vision(
        image_size=tower["image_size"],
        patch=tower["patch_size"],
        width=tower["hidden_size"],
        ff_width=tower["intermediate_size"],
        layers=tower["num_hidden_layers"],
        heads=tower["num_attention_heads"],
        tokens_per_image=config["mm_tokens_per_image"],
        eps=tower["layer_norm_eps"],
    )
    text = fixture_architecture(config["text_config"])
    a = Architecture(**{**text.__dict__, "vision": vision})
    text_arrays = {name.removeprefix("language_model."): x for name, x in arrays.items()}
    params = fixture_parameters(text_arrays, a)
    params["vision"] = jax.tree.map(jnp.asarray, tower_parameters(arrays, vision))
    return a, params, dict(np.load(folder / "expected.npz"))


def tower_parameters(arrays: dict, vision: Vision) -> dict:
    def stack(name, turn=np.asarray):
        return np.stack([turn(arrays[f"vision_tower.encoder.layers.{i}.{name}"]) for i in range(vision.layers)])

    w, h, d = vision.width, vision.heads, vision.width // vision.heads
    layers = {f"{ours}_scale": stack(f"{theirs}.weight") for ours, theirs in _NORMS.items()}
    layers |= {f"{ours}_bias": stack(f"{theirs}.bias") for ours, theirs in _NORMS.items()}
    layers |= {ours: stack(f"{theirs}.weight", np.transpose) for ours, theirs in _MATRICES.items()}
    layers |= {f"{ours}_bias": stack(f"{theirs}.bias") for ours, theirs in _MATRICES.items()}
    layers["out"] = layers["out"].reshape(-1, h, d, w)
    parts = [stack(f"self_attn.{n}_proj.weight", lambda x: x.T.reshape(w, h, d)) for n in "qkv"]
    layers["query_key_value"] = np.stack(parts, axis=2)
    biases = [stack(f"self_attn.{n}_proj.bias", lambda x: x.reshape(h, d)) for n in "qkv"]
    layers["query_key_value_bias"] = np.stack(biases, axis=1)
    return {
        "patch_kernel": arrays["vision_tower.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "patch_bias": arrays["vision_tower.embeddings.patch_embedding.bias"],
        "position": arrays["vision_tower.embeddings.position_embedding.weight"],
        "layers": layers,
        "final_norm_scale": arrays["vision_tower.post_layernorm.weight"],
        "final_norm_bias": arrays["vision_tower.post_layernorm.bias"],
        "soft_norm": arrays["multi_modal_projector.mm_soft_emb_norm.weight"],
        "project": arrays["multi_modal_projector.mm_input_projection_weight"],
    }


def tower_norms(gradient: dict, vision: Vision) -> dict[str, float]:
    """L2 norms of the tower's gradient under the reference's parameter names."""
    g, layers = gradient["vision"], gradient["vision"]["layers"]
    named = {f"{theirs}.weight": layers[f"{ours}_scale"] for ours, theirs in _NORMS.items()}
    named |= {f"{theirs}.bias": layers[f"{ours}_bias"] for ours, theirs in (_NORMS | _MATRICES).items()}
    named |= {f"{theirs}.weight": layers[ours] for ours, theirs in _MATRICES.items()}
    for i, n in enumerate("qkv"):
        named[f"self_attn.{n}_proj.weight"] = layers["query_key_value"][:, :, i]
        named[f"self_attn.{n}_proj.bias"] = layers["query_key_value_bias"][:, i]
    tower, projector = "model.vision_tower", "model.multi_modal_projector"
    whole = {
        f"{tower}.embeddings.patch_embedding.weight": g["patch_kernel"],
        f"{tower}.embeddings.patch_embedding.bias": g["patch_bias"],
        f"{tower}.embeddings.position_embedding.weight": g["position"],
        f"{tower}.post_layernorm.weight": g["final_norm_scale"],
        f"{tower}.post_layernorm.bias": g["final_norm_bias"],
        f"{projector}.mm_soft_emb_norm.weight": g["soft_norm"],
        f"{projector}.mm_input_projection_weight": g["project"],
    }
    whole |= {f"{tower}.encoder.layers.{i}.{n}": x[i] for n, x in named.items() for i in range(vision.layers)}
    return {name: float(jnp.linalg.norm(x)) for name, x in whole.items()}


def soft_places(is_soft: np.ndarray, tokens_per_image: int) -> np.ndarray:
    """Soft-token numbers of rows whose images fill the slots in order."""
    assert not (is_soft.sum(axis=1) % tokens_per_image).any()
    return np.where(is_soft, np.cumsum(is_soft, axis=1), 0).astype(np.int32)


def load_jax_form(folder: Path) -> tuple[Architecture, dict, dict]:
    """Architecture, parameters, and `expected.npz` of the Orbax fixture."""
    import orbax.checkpoint as ocp

    config = json.loads((folder / "config.json").read_text())
    tower = config["vision"]
    vision = Vision(
        image_size=tower["image_size"],
        patch=tower["patch_size"],
        width=tower["width"],
        ff_width=tower["mlp_dim"],
        layers=tower["depth"],
        heads=tower["num_heads"],
        tokens_per_image=tower["tokens_per_image"],
    )
    a = Architecture(
        vocab_size=config["num_embed"],
        width=config["embed_dim"],
        ff_width=config["hidden_dim"],
        layers=config["num_layers"],
        heads=config["num_heads"],
        kv_heads=config["num_kv_heads"],
        head_width=config["head_dim"],
        query_scale=config["head_dim"] ** -0.5,
        window=config["sliding_window_size"],
        rope_scale=config["global_scale_factor"],
        vision=vision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that restoring to the sharding of the file is slow
        tree = jax.tree.map(np.asarray, ocp.PyTreeCheckpointer().restore(folder / "nested"))
    params = {"model": _text_of_nested(tree, a), "vision": _tower_of_nested(tree, vision)}
    return a, jax.tree.map(jnp.asarray, params), dict(np.load(folder / "expected.npz"))


def _text_of_nested(tree: dict, a: Architecture) -> dict:
    def stack(*path, turn=np.asarray):
        return np.stack([turn(_at(tree[f"layer_{i}"], path)) for i in range(a.layers)])

    layers = {
        "attention_norm": stack("pre_attention_norm", "scale"),
        "query": stack("attn", "q_einsum", "w", turn=lambda x: x.transpose(1, 0, 2)),
        "key_value": stack("attn", "kv_einsum", "w", turn=lambda x: x.transpose(2, 0, 1, 3)),
        "query_norm": stack("attn", "_query_norm", "scale"),
        "key_norm": stack("attn", "_key_norm", "scale"),
        "out": stack("attn", "attn_vec_einsum", "w"),
        "post_attention_norm": stack("post_attention_norm", "scale"),
        "mlp_norm": stack("pre_ffw_norm", "scale"),
        "gate_up": stack("mlp", "gating_einsum", turn=lambda x: x.transpose(2, 0, 1)),
        "down": stack("mlp", "linear"),
        "post_mlp_norm": stack("post_ffw_norm", "scale"),
    }
    return {
        "embedding": tree["embedder"]["input_embedding"],
        "layers": layers,
        "final_norm": tree["final_norm"]["scale"],
    }


def _tower_of_nested(tree: dict, vision: Vision) -> dict:
    encoder = tree["vision_encoder"]["siglip_encoder"]

    def stack(*path):
        return np.stack([_at(encoder["Transformer"][f"encoderblock_{i}"], path) for i in range(vision.layers)])

    layers = {}
    for i, name in enumerate(("attention_norm", "mlp_norm")):
        layers |= {f"{name}_{part}": stack(f"LayerNorm_{i}", part) for part in ("scale", "bias")}
    attention = "MultiHeadDotProductAttention_0"
    for i, name in enumerate(("up", "down")):
        layers |= {
            name: stack("MlpBlock_0", f"Dense_{i}", "kernel"),
            f"{name}_bias": stack("MlpBlock_0", f"Dense_{i}", "bias"),
        }
    parts = ("query", "key", "value")
    layers["query_key_value"] = np.stack([stack(attention, n, "kernel") for n in parts], axis=2)
    layers["query_key_value_bias"] = np.stack([stack(attention, n, "bias") for n in parts], axis=1)
    layers |= {"out": stack(attention, "out", "kernel"), "out_bias": stack(attention, "out", "bias")}
    return {
        "patch_kernel": encoder["embedding"]["kernel"],
        "patch_bias": encoder["embedding"]["bias"],
        "position": encoder["pos_embedding"][0],
        "layers": layers,
        "final_norm_scale": encoder["Transformer"]["encoder_norm"]["scale"],
        "final_norm_bias": encoder["Transformer"]["encoder_norm"]["bias"],
        "soft_norm": tree["embedder"]["mm_soft_embedding_norm"]["scale"],
        "project": tree["embedder"]["mm_input_projection"]["w"],
    }


def _at(tree: dict, path: tuple[str, ...]) -> np.ndarray:
    for name in path:
        tree = tree[name]
    return next(iter(tree.values())) if isinstance(tree, dict) else tree
