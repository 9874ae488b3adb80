"""A folder that transformers loads: safetensors, config, generation config, tokenizer and, with vision, processor."""

import json
from pathlib import Path
from typing import Any

from rlhf.model.checkpoints import hf_config, write_safetensors, write_tokenizer
from rlhf.model.gemma3 import Architecture
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision

Tree = dict[str, Any]


def write(tree: Tree, a: Architecture, dtype: str, tokenizer: Tokenizer, folder: Path, max_shard_bytes: int) -> None:
    """tree: the components `model` and, where the architecture has a tower, `vision`. folder: exists and is empty."""
    write_safetensors.write(tree, a, dtype, folder, max_shard_bytes)
    write_tokenizer.write(tokenizer, folder, with_images=a.vision is not None)
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [tokenizer.eos, tokenizer.end_of_turn],
        "pad_token_id": tokenizer.pad,
    }
    text = hf_config.text_config(a, write_safetensors.n_rows(a), dtype) | ids
    if a.vision is None:
        config = {"architectures": ["Gemma3ForCausalLM"], **text}
    else:
        config = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": text,
            "vision_config": hf_config.vision_config(a.vision, dtype),
            "mm_tokens_per_image": a.vision.tokens_per_image,
            "boi_token_index": tokenizer.start_of_image,
            "eoi_token_index": tokenizer.end_of_image,
            "image_token_index": tokenizer.n_vocab,
            "tie_word_embeddings": True,
            "dtype": dtype,
            **ids,
        }
        _write_processor(a.vision, folder)
    _write_json(folder / hf_config.FILE, config)
    _write_json(folder / "generation_config.json", ids)


def _write_processor(vision: Vision, folder: Path) -> None:
    side = {"height": vision.image_size, "width": vision.image_size}
    half = [0.5, 0.5, 0.5]
    common = {"processor_class": "Gemma3Processor", "image_seq_length": vision.tokens_per_image}
    picture = {"image_processor_type": "Gemma3ImageProcessor", "do_convert_rgb": True, "size": side, "resample": 2}
    scale = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    _write_json(folder / "preprocessor_config.json", common | picture | scale | {"image_mean": half, "image_std": half})
    _write_json(folder / "processor_config.json", common)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
