"""Prompts in, text out: generation with the tokenizer's stop tokens, and the samples shown while training."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Key

from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.model.tokenizer import Tokenizer
from rlhf.sampling.generate import generate
from rlhf.sampling.methods import Greedy, Method, Sample


@runtime_checkable
class Prompt(Protocol):
    """What is read of a prompt. answer: the reference, if any. fields: the dataset's row. row: its index there."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def answer(self) -> str | None: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...
    @property
    def row(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Completion:
    """text: without control tokens. n_tokens: with the stop token. is_truncated: cut at `max_new_tokens`."""

    text: str
    n_tokens: int
    is_truncated: bool


def complete(
    model: Gemma3,
    params: Tree,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    method: Method,
    max_new_tokens: int,
    key: Key[Array, ""],
    least_prompts: int = 1,
    least_prompt_tokens: int = 1,
) -> list[Completion]:
    """One continuation of each prompt, as one batch; ends at EOS or `<end_of_turn>`.

    No other control token is ever drawn: none is an answer. Noise depends on the prompt's row in its dataset.
    """
    generation = generate(
        model,
        params,
        [prompt.token_ids for prompt in prompts],
        method=method,
        max_new_tokens=max_new_tokens,
        key=key,
        stop_ids=tokenizer.stop_ids,
        forbidden_ids=never_drawn(tokenizer, model.architecture.vocab_size),
        rows=[prompt.row for prompt in prompts],
        least_prompts=least_prompts,
        least_prompt_tokens=least_prompt_tokens,
    )
    endings = zip(generation.answers(), generation.n_tokens, generation.is_finished, strict=True)
    return [Completion(tokenizer.decode(ids), int(n), not finished) for ids, n, finished in endings]


@functools.lru_cache(maxsize=8)
def never_drawn(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Ids that are no part of an answer: control tokens, other than those that end it, and ids without a piece."""
    return tuple(i for i in range(vocab_size) if tokenizer.is_control(i) and i not in tokenizer.stop_ids)


def show_prompt(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """The prompt as the model sees it, control tokens spelt out."""
    return tokenizer.decode(prompt.token_ids, show_control=True)


def sample_rows(
    model: Gemma3,
    params: Tree,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    step: int,
    seed: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """A greedy and a temperature-1 answer to each prompt, as rows for `samples.jsonl`.

    The noise depends on seed, step, row and position, so a resumed run writes the same rows.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    answers = [
        complete(model, params, tokenizer, prompts, method=method, max_new_tokens=max_new_tokens, key=key)
        for method in (Greedy(), Sample())
    ]
    return [
        {
            "step": step,
            "row": prompt.row,
            "prompt": show_prompt(tokenizer, prompt),
            "greedy": greedy.text,
            "sampled": sampled.text,
            "answer": prompt.answer,
        }
        for prompt, greedy, sampled in zip(prompts, *answers, strict=True)
    ]
