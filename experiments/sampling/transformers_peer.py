"""`generate` of transformers, float32: python transformers_peer.py rollout tiny|270m float32 ROUNDS"""

import sys

import shape
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

torch.set_num_threads(2)


def main(name: str, rounds: int) -> None:
    s = shape.SIZES[name]
    layer_types = [
        "full_attention" if i % shape.PATTERN == shape.PATTERN - 1 else "sliding_attention" for i in range(s.layers)
    ]
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        intermediate_size=s.ff_width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_width,
        query_pre_attn_scalar=s.head_width,
        sliding_window=s.window,
        layer_types=layer_types,
        dtype="float32",
    )
    model = Gemma3ForCausalLM(config).to(torch.float32).eval()
    tokens = torch.tensor(shape.prompts(s, shape.ROWS, shape.PROMPT))
    settings = {
        "attention_mask": torch.ones_like(tokens),
        "do_sample": True,
        "temperature": shape.TEMPERATURE,
        "top_k": shape.TOP_K,
        "min_new_tokens": shape.NEW,
        "max_new_tokens": shape.NEW,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    def run():
        with torch.no_grad():
            found = model.generate(tokens, **settings)
        assert found.shape[1] == shape.PROMPT + shape.NEW

    run()
    shape.say("ready")
    shape.report(tokens_per_second=shape.ROWS * shape.NEW / shape.seconds(run, rounds))


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[4]))
