"""The shape that every contender runs: a Gemma 3 of 6.8 million parameters on 8 sequences of 256 tokens.

Needs nothing but Python: the peers live in other environments. A contender is a process that prints a line `step N/M`
when its N-th optimizer step is done; whoever started it reads the clock.
"""

import random

VOCAB = 4096
WIDTH = 256
FF_WIDTH = 1024
LAYERS = 6
HEADS = 4
KV_HEADS = 1
HEAD_WIDTH = 64
WINDOW = 128
PATTERN = 6
ROPE_BASE_LOCAL = 10_000.0
ROPE_BASE_GLOBAL = 1_000_000.0

TIME = 256
PROMPT = 32  # of the 256 tokens of a preference pair's answers
ROWS = {"sft": 8, "dpo": 4}  # sequences, or pairs of them
LEARNING_RATE = 1e-5
BETA = 0.1


def token_rows(n_rows: int, n_tokens: int, seed: int) -> list[list[int]]:
    """Random ordinary tokens: no special ones, whose ids are below 300 in every tokenizer here."""
    draw = random.Random(seed)
    return [[draw.randrange(300, VOCAB) for _ in range(n_tokens)] for _ in range(n_rows)]


def say_step(step: int, n_steps: int) -> None:
    print(f"step {step}/{n_steps}", flush=True)
