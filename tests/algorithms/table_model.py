"""A model without a network: the log-probability of a token is looked up in a table that is its parameters."""

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from rlhf.algorithms.base import Runtime
from rlhf.algorithms.reference import LiveReference


class TableModel:
    """params["model"]: `logprobs` [vocab], and `collision` [vocab] for statistics. Counts what it is asked for."""

    def token_logprobs(self, params, batch, temperature=1.0):
        return jnp.where(batch["segments"] > 0, params["model"]["logprobs"][batch["tokens"]], 0.0)

    def token_statistics(self, params, batch, temperature=1.0):
        collision = jnp.where(batch["segments"] > 0, params["model"]["collision"][batch["tokens"]], 0.0)
        return SimpleNamespace(logprobs=self.token_logprobs(params, batch), log_collision=collision)


MODEL = TableModel()
SHARED_LOSSES = Path(__file__).resolve().parents[3] / "shared/fixtures/losses"  # read where cases are collected


def random_params(seed: int, n_words: int = 40) -> dict:
    random = np.random.default_rng(seed)
    table = {name: jnp.asarray(-random.gamma(1.0, 1.0, n_words), jnp.float32) for name in ("logprobs", "collision")}
    return {"model": table}


def runtime(reference_params: dict, rows: int = 4) -> Runtime:
    return Runtime(model=MODEL, tokenizer=None, reference=LiveReference(MODEL, reference_params, rows))


def random_batch(seed: int, shape: tuple[int, ...], n_words: int = 40) -> dict:
    """Sequences of different lengths: a prompt of the lower half of the words, an answer of the upper half, padding."""
    random = np.random.default_rng(seed)
    time = shape[-1]
    n_prompt = random.integers(1, time // 2 - 1, (*shape[:-1], 1))
    n_tokens = n_prompt + random.integers(1, time // 2 + 1, (*shape[:-1], 1))
    place = np.arange(time)
    is_answer = (place >= n_prompt) & (place < n_tokens)
    return {
        "tokens": random.integers(0, n_words // 2, shape, dtype=np.int32) + is_answer * np.int32(n_words // 2),
        "is_answer": is_answer,
        "segments": (place < n_tokens).astype(np.int32),
        "positions": np.where(place < n_tokens, place, 0).astype(np.int32),
        "row": np.arange(shape[0], dtype=np.int32),
    }


def unpaired_batch(seed: int, n_rows: int, time: int = 12) -> dict:
    batch, mismatched = random_batch(seed, (n_rows, time)), random_batch(seed + 1, (n_rows, time + 2))
    kl = {f"kl_{name}": mismatched[name] for name in ("tokens", "is_answer", "segments", "positions")}
    return {**batch, **kl, "is_desirable": np.arange(n_rows) % 3 != 0}


def rows_of(batch: dict, rows: slice) -> dict:
    return {name: value[rows] for name, value in batch.items()}
