"""An adapter as peft loads it: `adapter_model.safetensors` and `adapter_config.json`."""

import json
from pathlib import Path
from typing import Any

from rlhf.model.lora import LoRA
from rlhf.model.peft import CONFIG, WEIGHTS, to_peft

Tree = dict[str, Any]


def write(adapter: Tree, lora: LoRA, base: str | None, folder: Path) -> None:
    """adapter: the component of that name. base: where the adapter's base comes from, as `Source.pinned` has it."""
    from safetensors.numpy import save_file

    is_on_hub = base is not None and base.startswith("hf://")
    name = base.removeprefix("hf://").partition("@")[0] if base is not None and is_on_hub else None
    tensors, config = to_peft(adapter, lora, name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
