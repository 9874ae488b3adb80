"""The shape as a model of transformers with random weights, and a tokenizer of as many words."""

import shape
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

torch.set_num_threads(2)


def new_model() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    layer_types = [
        "full_attention" if i % shape.PATTERN == shape.PATTERN - 1 else "sliding_attention" for i in range(shape.LAYERS)
    ]
    config = Gemma3TextConfig(
        vocab_size=shape.VOCAB,
        hidden_size=shape.WIDTH,
        intermediate_size=shape.FF_WIDTH,
        num_hidden_layers=shape.LAYERS,
        num_attention_heads=shape.HEADS,
        num_key_value_heads=shape.KV_HEADS,
        head_dim=shape.HEAD_WIDTH,
        query_pre_attn_scalar=shape.HEAD_WIDTH,
        sliding_window=shape.WINDOW,
        layer_types=layer_types,
        max_position_embeddings=shape.TIME,
        dtype="float32",
    )
    return Gemma3ForCausalLM(config).to(torch.float32).train()


def new_tokenizer():
    """Word `w17` is token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, **{f"w{i}": i for i in range(3, shape.VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)
