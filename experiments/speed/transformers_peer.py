"""A plain loop over a Gemma3ForCausalLM of transformers: python transformers_peer.py sft STEPS"""

import sys

import shape
import torch
from torch_model import new_model


def main(method: str, n_steps: int) -> None:
    model = new_model(shape.SIZE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.LEARNING_RATE, weight_decay=0.0, fused=True)
    for step in range(n_steps):
        tokens = torch.tensor(shape.token_rows(shape.ROWS[method], shape.TIME, step))
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        shape.say_step(step + 1, n_steps)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
