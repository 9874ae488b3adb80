"""The shape that every contender runs: a Gemma 3 of 6.8 million parameters on 8 sequences of 256 tokens, or (with
SPEED_SIZE=270m in the environment) of 268 million on two.

Needs nothing but Python: the peers live in other environments. A contender is a process that prints a line `step N/M`
when its N-th optimizer step is done; whoever started it reads the clock.
"""

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from size import PATTERN, SIZES

__all__ = ["PATTERN", "SIZE"]

NAME = os.environ.get("SPEED_SIZE", "tiny")  # tiny or 270m: which size is run
SIZE = SIZES[NAME]

TIME = 256
PROMPT = 32  # of the 256 tokens of a preference pair's answers
# sequences, or pairs of them, or prompts
ROWS = {"tiny": {"sft": 8, "dpo": 4, "grpo": 4, "ppo": 8}, "270m": {"sft": 2, "dpo": 1, "grpo": 2, "ppo": 2}}[NAME]
SAMPLES = 4  # answers to each prompt of GRPO
ASKED, ANSWERED = 64, 64  # tokens of the prompts and of the answers that are written to them
LEARNING_RATE = 1e-5
BETA = 0.1


def token_rows(n_rows: int, n_tokens: int, seed: int) -> list[list[int]]:
    """Random ordinary tokens: no special ones, whose ids are below 300 in every tokenizer here."""
    draw = random.Random(seed)
    return [[draw.randrange(300, SIZE.vocab) for _ in range(n_tokens)] for _ in range(n_rows)]


def say_step(step: int, n_steps: int) -> None:
    print(f"step {step}/{n_steps}", flush=True)
