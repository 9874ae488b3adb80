"""This project: the `rlhf` command, on a jsonl file of random words that are cut to 256 tokens a row."""

import json
import random
import sys
from pathlib import Path

import shape

_WORDS = ("the", "of", "and", "to", "in", "is", "you", "that", "was", "for", "on", "are", "with", "as", "they", "be")


def _text(draw: random.Random, n_words: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(n_words))


def write_rows(folder: Path) -> None:
    """`sft.jsonl`, `dpo.jsonl`, `prompts.jsonl`: 64 rows each, longer than a row may be."""
    draw = random.Random(0)
    with open(folder / "sft.jsonl", "w") as sft, open(folder / "dpo.jsonl", "w") as dpo:
        for _ in range(64):
            asked, answers = {"role": "user", "content": _text(draw, 10)}, [_text(draw, 400) for _ in range(2)]
            dialogues = [[asked, {"role": "assistant", "content": answer}] for answer in answers]
            print(json.dumps({"messages": dialogues[0]}), file=sft)
            print(json.dumps({"chosen": dialogues[0], "rejected": dialogues[1]}), file=dpo)
    rows = (json.dumps({"prompt": _text(draw, 100)}) for _ in range(64))
    (folder / "prompts.jsonl").write_text("\n".join(rows))


_DATA = {"sft": "sft_jsonl", "dpo": "preference_jsonl", "grpo": "prompts_jsonl", "ppo": "prompts_jsonl"}


def _online(method: str) -> dict[str, object]:
    """Rewards that cost nothing; PPO makes two passes of two optimizer steps."""
    rows = shape.ROWS[method]
    settings = {
        "reward": "random",
        "dataset.max_length": shape.ASKED,
        "algorithm.max_new_tokens": shape.ANSWERED,
        "evaluation.rows": 0,
    }
    if method == "grpo":
        sizes = {"group_size": shape.SAMPLES, "microbatch_size": rows * shape.SAMPLES}
    else:
        sizes = {"epochs": 2, "minibatches": 2, "microbatch_size": rows // 2}
    return settings | {f"algorithm.{name}": value for name, value in sizes.items()}


def command(method: str, n_steps: int, rows: Path, out: Path, cache: Path) -> list[str]:
    """The command line; nothing in it is special to a benchmark but the shape."""
    size = shape.SIZE
    model = {
        "vocab_size": size.vocab, "width": size.width, "ff_width": size.ff_width, "layers": size.layers,
        "heads": size.heads, "kv_heads": size.kv_heads, "head_width": size.head_width, "window": size.window,
        "pattern": shape.PATTERN, "query_scale": size.head_width**-0.5,
    }  # fmt: skip
    overrides = {
        "hydra.run.dir": out,
        "hardware": "cpu",
        "hardware.compilation_cache": cache,
        "dataset": _DATA[method],
        "dataset.path": rows / f"{method if method in ('sft', 'dpo') else 'prompts'}.jsonl",
        "dataset.max_length": shape.TIME,
        "dataset.on_long": "truncate",
        "algorithm": method,
        "algorithm.batch_size": shape.ROWS[method],
        "algorithm.microbatch_size": shape.ROWS[method],
        "algorithm.learning_rate": shape.LEARNING_RATE,
        "trainer.max_steps": n_steps,
        "trainer.epochs": 1000,
    }
    if method in ("grpo", "ppo"):
        overrides |= _online(method)
    overrides |= {f"model.{key}": value for key, value in model.items()}
    return [sys.executable, "-m", "rlhf", *(f"{key}={value}" for key, value in overrides.items())]
