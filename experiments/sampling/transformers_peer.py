"""`generate` of transformers, float32: python transformers_peer.py rollout tiny|270m float32 ROUNDS"""

import sys

import shape
import torch
from torch_model import new_model


def main(name: str, rounds: int) -> None:
    s = shape.SIZES[name]
    model = new_model(s).eval()
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
