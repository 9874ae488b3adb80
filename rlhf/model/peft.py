"""Adapters in the form of the peft library: `adapter_config.json` and `adapter_model.safetensors`, in and out.

peft keeps a matrix pair for each projection of each layer, transposed: lora_A [rank, in], lora_B [out, rank].
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import CheckpointError
from rlhf.model.lora import PROJECTIONS, LoRA, sizes

Tree = dict[str, Any]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_OURS = {name: ours for ours, name in PEFT_NAMES.items()}
_NAME = re.compile(
    r"base_model\.model\.(?:model\.|language_model\.)*layers\.(\d+)\.((?:self_attn|mlp)\.\w+)"
    r"\.lora_([AB])\.(?:default\.)?weight"
)
# settings of peft that make another function of the same arrays, and the values at which they don't
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
}
# ways to begin that also change the base, so that the adapter fits no published one
_CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
_HARMLESS = ("eva_config", "megatron_config")  # of a way to begin, and of another kind of layer


def tensor_name(layer: int, projection: str, which: str) -> str:
    """peft's name for a matrix; which: `a` or `b`."""
    return f"base_model.model.model.layers.{layer}.{PEFT_NAMES[projection]}.lora_{which.upper()}.weight"


def read_settings(folder: Path) -> LoRA:
    """The settings of the adapter in a folder, without its projections, which only the arrays tell.

    Raises:
        CheckpointError: a file is missing or no JSON, or it uses a feature of peft that is not supported; names it.
    """
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"no adapter in {folder}: {CONFIG} and {WEIGHTS} are expected")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(found["r"]), float(found["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no configuration of a peft adapter: {error!r}") from error
    for key, values in _PLAIN.items():
        if key in found and found[key] not in values:
            raise CheckpointError(f"{path}: {key}={found[key]!r} is not supported, only {key}={values[0]!r}")
    variants = [key for key in found if key.endswith("_config") and found[key] and key not in _HARMLESS]
    if variants:
        raise CheckpointError(f"{path}: {variants[0]} is given, and that kind of adapter is not supported")
    start = str(found.get("init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASES):
        raise CheckpointError(
            f"{path}: init_lora_weights={start!r} also changed the base, so this adapter does not fit the original; "
            "convert it with peft (path_initial_model_for_weight_conversion of save_pretrained) first"
        )
    dropout = float(found.get("lora_dropout") or 0.0)
    return LoRA(rank=rank, alpha=alpha, dropout=dropout, rank_stabilised=bool(found.get("use_rslora")))


def read_peft(folder: Path, architecture: Any) -> tuple[LoRA, Tree]:
    """Settings and arrays (numpy, the component `adapter`) of the adapter in a folder.

    Raises:
        CheckpointError: also if arrays are missing, of another shape, or not of the language model's projections.
    """
    import safetensors
    from safetensors.numpy import load_file

    folder = Path(folder)
    lora = read_settings(folder)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    except TypeError as error:  # a number type that numpy has no name for
        raise CheckpointError(f"{path}: {error}; save the adapter in float32") from error
    found = _sorted_out(path, tensors)
    names = tuple(name for name in PROJECTIONS if any(key[1] == name for key in found))
    lora = LoRA(
        rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=names, rank_stabilised=lora.rank_stabilised
    )
    return lora, {"layers": {name: _stacked(path, found, name, lora, architecture) for name in names}}


def _sorted_out(path: Path, tensors: dict[str, np.ndarray]) -> dict[tuple[int, str, str], np.ndarray]:
    """(layer, projection, `a` or `b`) of each tensor."""
    found, other = {}, []
    for full, tensor in tensors.items():
        match = _NAME.fullmatch(full)
        if match is None or match[2] not in _OURS:
            other.append(full)
        else:
            found[int(match[1]), _OURS[match[2]], match[3].lower()] = tensor
    if other:
        what = "is of the vision tower" if "vision" in other[0] else "is no low-rank pair of a projection"
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise CheckpointError(
            f"{path}: {sorted(other)[0]}{more} {what}; read are those of {', '.join(PEFT_NAMES.values())} of the "
            "language model"
        )
    if not found:
        raise CheckpointError(f"{path} holds no tensors")
    return found


def _stacked(path: Path, found: dict, name: str, lora: LoRA, architecture: Any) -> Tree:
    n_in, n_out = sizes(architecture)[name]
    wanted = {"a": (lora.rank, n_in), "b": (n_out, lora.rank)}
    beyond = sorted(layer for layer, projection, _ in found if projection == name and layer >= architecture.layers)
    if beyond:
        raise CheckpointError(
            f"{path}: {tensor_name(beyond[0], name, 'a')} is of a layer that this model of {architecture.layers} lacks"
        )
    arrays: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    for which, layer in ((w, i) for w in "ab" for i in range(architecture.layers)):
        tensor = found.get((layer, name, which))
        full = tensor_name(layer, name, which)
        if tensor is None:
            raise CheckpointError(f"{path} lacks {full}")
        if tensor.shape != wanted[which]:
            raise CheckpointError(
                f"{path}: {full} is {list(tensor.shape)}, but rank {lora.rank} here needs {list(wanted[which])}"
            )
        arrays[which].append(tensor.astype(np.float32).T)
    return {which: np.stack(parts) for which, parts in arrays.items()}


def to_peft(adapter: Tree, lora: LoRA, base: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An adapter as peft's tensors by name, and what its `adapter_config.json` says.

    base: what peft should find the base model by.
    """
    tensors = {}
    for name, arrays in adapter["layers"].items():
        for which in "ab":
            for layer, matrix in enumerate(np.asarray(arrays[which], np.float32)):
                tensors[tensor_name(layer, name, which)] = np.ascontiguousarray(matrix.T)
    names = sorted(PEFT_NAMES[name].rsplit(".", 1)[1] for name in adapter["layers"])
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": float(lora.alpha),
        "lora_dropout": float(lora.dropout),
        "use_rslora": lora.rank_stabilised,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "alpha_pattern": {},
        "rank_pattern": {},
    }
    return tensors, config
