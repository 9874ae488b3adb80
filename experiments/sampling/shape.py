"""What every contender runs. Needs nothing but Python: the peers live in other environments.

A contender is a process that prints `ready` when its first rollout is done, then one line of JSON with its rates.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from size import PATTERN, ROPE_BASE_GLOBAL, ROPE_BASE_LOCAL, SIZES, Size

__all__ = ["PATTERN", "ROPE_BASE_GLOBAL", "ROPE_BASE_LOCAL", "SIZES", "Size"]


ROWS, PROMPT, NEW = 8, 64, 64
TEMPERATURE, TOP_K = 0.9, 50
GROUPS, SAMPLES, LONG_PROMPT = 4, 16, 256
QUEUE, SLOTS, MEAN_LENGTH, MOST = 128, 16, 40, 256
FIRST_WORD = 300  # ids below are special in some tokenizer


def prompts(size: Size, n: int, n_tokens: int, seed: int = 0) -> list[list[int]]:
    """Random ordinary tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_WORD, size.vocab) for _ in range(n_tokens)] for _ in range(n)]


def lengths(seed: int = 0) -> list[int]:
    """Lengths of answers: geometric with the mean MEAN_LENGTH, cut at MOST."""
    draw, found = random.Random(seed), []
    for _ in range(QUEUE):
        n = 1
        while n < MOST and draw.random() > 1 / MEAN_LENGTH:
            n += 1
        found.append(n)
    return found


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median wall time."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def say(line: str) -> None:
    print(line, flush=True)


def report(**numbers: float) -> None:
    say(json.dumps(numbers))
