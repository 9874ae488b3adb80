"""A size as a model of transformers with random float32 weights."""

import torch
from size import Size
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

torch.set_num_threads(2)


def new_model(size: Size) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.ff_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_width,
        query_pre_attn_scalar=size.head_width,
        sliding_window=size.window,
        layer_types=size.layer_types,
        max_position_embeddings=4096,
        dtype="float32",
    )
    return Gemma3ForCausalLM(config).to(torch.float32)
