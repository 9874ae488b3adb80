"""`config.json` of Hugging Face: our numbers in their words, read in both of its forms.

The newer form has `rope_parameters` and `layer_types`, the older one `rope_theta`, `rope_local_base_freq`,
`rope_scaling` and `sliding_window_pattern`. A key that a file leaves out has the default of transformers 5.23.0.
"""

import json
import math
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError, ConfigError
from rlhf.model.checkpoints.matching import PADDING_ROWS
from rlhf.model.gemma3 import Architecture
from rlhf.model.vision import Vision

FILE = "config.json"
_REL = 1e-6

# their names of our numbers
_SIZES = {
    "hidden_size": "width",
    "intermediate_size": "ff_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
_TEXT = _SIZES | {
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "sliding_window": "window",
    "rms_norm_eps": "eps",
}
_VISION = _SIZES | {"image_size": "image_size", "patch_size": "patch", "layer_norm_eps": "eps"}
# what a file may leave out and arrays do not show
_DEFAULTS = {
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
# the only values that Gemma 3 has and this implementation knows
_FIXED = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
}


def require_same(path: Path, a: Architecture) -> None:
    """Compare a `config.json` with the architecture.

    Raises:
        CheckpointError: names each key that differs, its value in the file, and our setting.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        different = _text_differences(text, a)
        if a.vision is not None and "vision_config" in config:
            different += _vision_differences(config, a)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read as a Gemma 3 config: {type(error).__name__} {error}") from error
    kind = config.get("model_type")
    if kind not in ("gemma3", "gemma3_text"):
        raise CheckpointError(f"{path}: model_type is {kind!r}; this is no Gemma 3 (gemma3, gemma3_text)")
    if a.vision is not None and "vision_config" not in config:
        raise CheckpointError(f"{path} describes a model of text only, and model.vision is set")
    if different:
        lines = "".join(f"\n  {line}" for line in different)
        raise CheckpointError(f"{path} describes another model than the one that is set:{lines}")


def _text_differences(text: dict[str, Any], a: Architecture) -> list[str]:
    ours = {theirs: (f"model.{name}", getattr(a, name)) for theirs, name in _TEXT.items()}
    found = _differences(_DEFAULTS | text, ours)
    scalar = (_DEFAULTS | text)["query_pre_attn_scalar"]
    if not math.isclose(scalar**-0.5, a.query_scale, rel_tol=_REL):
        found.append(
            f"query_pre_attn_scalar: {scalar}, a scale of {scalar**-0.5:.6g}; model.query_scale={a.query_scale:.6g}"
        )
    if "vocab_size" in text and text["vocab_size"] not in (a.vocab_size, a.vocab_size + PADDING_ROWS):
        found.append(f"vocab_size: {text['vocab_size']}; model.vocab_size={a.vocab_size}")
    is_global = _is_global(text, a)
    if is_global != list(a.is_global()):
        layers = ", ".join(str(i) for i, one in enumerate(is_global) if one) or "none"
        found.append(f"global layers: {layers}; model.pattern={a.pattern}")
    local, everywhere, scale = _rope(text)
    rope = {"rope of local layers": ("model.rope_base_local", a.rope_base_local)}
    rope["rope of global layers"] = ("model.rope_base_global", a.rope_base_global)
    rope["rope factor"] = ("model.rope_scale", a.rope_scale)
    found += _differences(dict(zip(rope, (local, everywhere, scale), strict=True)), rope)
    return found + [
        f"{k}: {text[k]!r}; Gemma 3 has {v!r}" for k, v in _FIXED.items() if text.get(k, v) not in (v, None)
    ]


def _differences(theirs: dict[str, Any], ours: dict[str, tuple[str, Any]]) -> list[str]:
    return [
        f"{key}: {theirs[key]}; {name}={value}"
        for key, (name, value) in ours.items()
        if key in theirs and not math.isclose(theirs[key], value, rel_tol=_REL)
    ]


def _is_global(text: dict[str, Any], a: Architecture) -> list[bool]:
    if "layer_types" in text:
        return [kind == "full_attention" for kind in text["layer_types"]]
    pattern = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
    return [i % pattern == pattern - 1 for i in range(text.get("num_hidden_layers", a.layers))]


def _rope(text: dict[str, Any]) -> tuple[float, float, float]:
    """Base of local layers, base and factor of global ones."""
    if rope := text.get("rope_parameters"):
        local, everywhere = rope["sliding_attention"], rope["full_attention"]
        return local["rope_theta"], everywhere["rope_theta"], _factor(everywhere)
    known = _DEFAULTS | text
    return known["rope_local_base_freq"], known["rope_theta"], _factor(text.get("rope_scaling") or {})


def _factor(scaling: dict[str, Any]) -> float:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"rope scaling of type {kind!r}; Gemma 3 has a linear one")
    return float(scaling.get("factor", 1.0)) if kind == "linear" else 1.0


def _vision_differences(config: dict[str, Any], a: Architecture) -> list[str]:
    v, theirs = a.vision, config["vision_config"]
    assert v is not None
    ours = {name: (f"model.vision.{own}", getattr(v, own)) for name, own in _VISION.items()}
    tokens = {"mm_tokens_per_image": ("model.vision.tokens_per_image", v.tokens_per_image)}
    return [f"vision {line}" for line in _differences(theirs, ours)] + _differences(config, tokens)


def require_expressible(a: Architecture) -> None:
    """Raises ConfigError where transformers 5.23.0 has no words for the architecture."""
    scalar = a.query_scale**-2
    if not math.isclose(scalar, round(scalar), rel_tol=_REL):
        raise ConfigError(
            f"format=hf: query_pre_attn_scalar is a whole number in transformers, and model.query_scale="
            f"{a.query_scale:g} would need {scalar:.6g}; format=orbax has no such limit"
        )
    if a.width % a.heads:
        raise ConfigError(
            f"format=hf: transformers takes no model.width={a.width} that is no multiple of model.heads={a.heads}; "
            "format=orbax does"
        )


def text_config(a: Architecture, n_rows: int, dtype: str) -> dict[str, Any]:
    """The text model's part, in the newer form. n_rows: of the embedding in the file.

    Raises:
        ConfigError: as `require_expressible`.
    """
    require_expressible(a)
    everywhere: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope_base_global}
    if a.rope_scale != 1:
        everywhere |= {"rope_type": "linear", "factor": a.rope_scale}
    return {
        "model_type": "gemma3_text",
        "vocab_size": n_rows,
        **{theirs: getattr(a, name) for theirs, name in _TEXT.items()},
        "query_pre_attn_scalar": round(a.query_scale**-2),
        "sliding_window_pattern": a.pattern,
        "layer_types": ["full_attention" if one else "sliding_attention" for one in a.is_global()],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": a.rope_base_local},
            "full_attention": everywhere,
        },
        "max_position_embeddings": 32_768 if a.rope_scale == 1 else 131_072,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": dtype,
        **_FIXED,
    }


def vision_config(v: Vision, dtype: str) -> dict[str, Any]:
    """The tower's part."""
    return {
        "model_type": "siglip_vision_model",
        **{theirs: getattr(v, name) for theirs, name in _VISION.items()},
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
        "dtype": dtype,
    }
