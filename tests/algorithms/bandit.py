"""A policy without a network: every token is drawn from one softmax over a few words, whatever came before.

With answers of one token it is a bandit with as many arms as words.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.algorithms.base import Runtime
from rlhf.algorithms.reference import LiveReference
from rlhf.data.encode import Prompt
from rlhf.model.tokenizer import Tokenizer
from rlhf.rewards.base import Scores
from rlhf.sampling.generate import Generation
from rlhf.sampling.sampler import Completion, Rollout

STOP = 0  # the word that ends an answer


class BanditModel:
    """params["model"]: logits [words]."""

    def token_logprobs(self, params, batch, temperature=1.0):
        logprobs = jax.nn.log_softmax(params["model"] / temperature)
        tokens = jnp.asarray(batch["tokens"])
        follows = jnp.asarray(batch["segments"]) > 0
        return jnp.where(follows, logprobs[tokens], 0.0).at[..., 0].set(0.0)


MODEL = BanditModel()


class BanditSampler:
    """Answers of `length` words at most; keeps the arguments of its calls."""

    def __init__(self, length: int = 3):
        self.length, self.calls = length, []
        self.settings, self.shapes = SimpleNamespace(slots=64), ()

    def __call__(self, params, prompts, *, n, method, max_new_tokens, step, stop, wants_entropy, shape):
        self.calls.append({"step": step, "rows": [prompt.row for prompt in prompts], "shape": shape})
        logprobs = np.asarray(jax.nn.log_softmax(params["model"] / method.temperature))
        random = np.random.default_rng([step, len(prompts)])
        shape = (len(prompts) * n, max_new_tokens)
        tokens, scores = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        n_tokens, reasons = np.zeros(len(tokens), np.int64), []
        for row in range(len(tokens)):
            drawn = random.choice(len(logprobs), self.length, p=np.exp(logprobs) / np.exp(logprobs).sum())
            ends = np.flatnonzero(drawn == STOP)
            n_tokens[row] = end = ends[0] + 1 if len(ends) else self.length
            reasons.append("stop" if len(ends) else "length")
            tokens[row, :end], scores[row, :end] = drawn[:end], logprobs[drawn[:end]]
        entropy = -(np.exp(logprobs) * logprobs).sum()
        generation = Generation(
            tokens=tokens,
            logprobs=scores,
            filtered_logprobs=scores,
            entropies=np.where(np.arange(shape[1]) < n_tokens[:, None], entropy, 0).astype(np.float32),
            likely=None,
            n_tokens=n_tokens,
            finish_reasons=reasons,
        )
        texts = [" ".join(map(str, row[:end])) for row, end in zip(tokens, n_tokens, strict=True)]
        done = [Completion(*parts) for parts in zip(texts, n_tokens.tolist(), reasons, strict=True)]
        return Rollout(done, generation, n, 0.1)


def prompt(row: int, n_tokens: int = 3) -> Prompt:
    return Prompt(tuple(range(1, n_tokens + 1)), str(row), {"index": row}, row)


def runtime(reward, reference=None, n_prompts: int = 64, length: int = 3, rows: int = 4) -> Runtime:
    """reward: from an `Answered` to a number; None: it could not tell. reference: logits."""
    prompts = [prompt(row, 2 + row % 2) for row in range(n_prompts)]

    def judge(answers, step):
        found = [reward(answer) for answer in answers]
        total = np.array([0.0 if one is None else one for one in found], np.float32)
        is_valid = np.array([one is not None for one in found])
        parts = {"part": np.where(is_valid, total, np.nan).astype(np.float32)}
        return Scores(total, parts, is_valid, {"rewards/part/errors": float((~is_valid).sum())}, 0.01, {})

    return Runtime(
        model=MODEL,
        tokenizer=Tokenizer(),
        reference=None if reference is None else LiveReference(MODEL, {"model": jnp.asarray(reference)}, rows),
        generate=BanditSampler(length),
        reward=judge,
        prompts=SimpleNamespace(prompts=prompts, pad=0, n_slots=0),
        more_prompts=lambda start, n: [prompts[place % n_prompts] for place in range(start, start + n)],
    )


def batch(*rows: int) -> dict:
    return {"prompts": [prompt(row, 2 + row % 2) for row in rows], "row": np.array(rows, np.int32)}
