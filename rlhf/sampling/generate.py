"""Generation: prompts in, tokens with their log-probabilities out. Knows token ids only; text is others' business.

Batch, prompt length and answer length are rounded up to buckets, and everything else is data, so a program is compiled
once per bucket and serves every prompt, method, number and stop list after that.
"""

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rlhf.config import Number
from rlhf.errors import ConfigError, DataError
from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.sampling.cache import LayerCache, decode, decoding_params, prefill, slots_of
from rlhf.sampling.methods import Method, Sample, draw

SMALLEST = 16  # tokens of the smallest bucket


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated; row i * n + j is the j-th sample of prompt i, and places after its end are 0.

    tokens: the stop token included.
    logprobs: of each token under softmax(logits / temperature) of the whole vocabulary, nats: what a trainer computes
        at that temperature. Greedy decoding has no such temperature and reports those of temperature 1.
    filtered_logprobs: under the distribution that the token was drawn from; 0 for greedy decoding.
    n_tokens: of each row. is_finished: it ended with a stop token; else it was cut at `max_new_tokens`.
    """

    tokens: Int[np.ndarray, "rows time"]
    logprobs: Float[np.ndarray, "rows time"]
    filtered_logprobs: Float[np.ndarray, "rows time"]
    n_tokens: Int[np.ndarray, "rows"]
    is_finished: Bool[np.ndarray, "rows"]

    @property
    def finish_reasons(self) -> list[str]:
        """`stop` or `length` for each row."""
        return ["stop" if finished else "length" for finished in self.is_finished]

    def answers(self) -> list[list[int]]:
        """The token ids of each row, without the stop token."""
        ends = self.n_tokens - self.is_finished
        return [row[:end].tolist() for row, end in zip(self.tokens, ends, strict=True)]


class _Prompts(NamedTuple):
    """The prompts as arrays; rows that only fill the bucket are not real. numbers: what a row's noise depends on."""

    tokens: Int[Array, "prompts time"]
    lengths: Int[Array, "prompts"]
    is_real: Bool[Array, "prompts"]
    numbers: Int[Array, "prompts"]


class _Limits(NamedTuple):
    """max_new_tokens: at most the bucket's. is_stop, is_forbidden: for every token id."""

    max_new_tokens: Int[Array, ""]
    is_stop: Bool[Array, "vocab"]
    is_forbidden: Bool[Array, "vocab"]


class _Output(NamedTuple):
    tokens: Int[Array, "rows new"]
    logprobs: Float[Array, "rows new"]
    filtered_logprobs: Float[Array, "rows new"]
    n_tokens: Int[Array, "rows"]


class _State(NamedTuple):
    """Between two tokens. step: tokens so far. hidden: of each row's last token. is_done: the row takes no more."""

    step: Int[Array, ""]
    hidden: Float[Array, "rows width"]
    cache: list[LayerCache]
    is_done: Bool[Array, "rows"]
    output: _Output


def bucket(n: int, smallest: int) -> int:
    """The least of 2^k and 3 · 2^k that holds n, and at least `smallest`."""
    power = 1 << (n - 1).bit_length()
    return max(smallest, power * 3 // 4 if n <= power * 3 // 4 else power)


def generate(
    model: Gemma3,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    method: Method,
    max_new_tokens: int,
    key: Key[Array, ""],
    stop_ids: Collection[int],
    forbidden_ids: Collection[int] = (),
    rows: Sequence[int] | None = None,
    least_prompts: int = 1,
    least_prompt_tokens: int = 1,
) -> Generation:
    """Continue each prompt `n` times, until a stop token or `max_new_tokens`.

    Each prompt runs through the model once, whatever `n` is. The noise of a token depends on `key`, the prompt's number
    in `rows` (its place, if not given), the sample's number and the token's position; on nothing else in the batch.

    forbidden_ids: never drawn; log-probabilities are still those of the whole vocabulary.
    least_prompts, least_prompt_tokens: choose buckets as if there were so many, so that a smaller last batch compiles
        nothing new.

    Raises:
        DataError: no prompt, an empty one, or a token id outside the vocabulary.
        ConfigError: `n` or `max_new_tokens` below 1, or no token left to draw.
    """
    vocab = model.architecture.vocab_size
    _check(prompts, n, max_new_tokens, vocab)
    rows = range(len(prompts)) if rows is None else rows
    if len(rows) != len(prompts):
        raise DataError(f"{len(prompts)} prompts need as many row numbers, not {len(rows)}")
    n_prompts = bucket(max(len(prompts), least_prompts), 1)
    n_slots = bucket(max(least_prompt_tokens, *map(len, prompts)), SMALLEST)
    packed = _pack(prompts, rows, n_prompts, n_slots)
    limits = _Limits(jnp.asarray(max_new_tokens), _is_among(stop_ids, vocab), _is_among(forbidden_ids, vocab))
    if len(set(forbidden_ids).intersection(range(vocab))) == vocab:
        raise ConfigError("forbidden_ids names every token of the vocabulary: nothing is left to generate")
    # One program for all methods and for numbers from a yaml or a computation: always a Sample of float32 scalars.
    sample = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), method.as_sample())
    n_new = bucket(max_new_tokens, SMALLEST)
    output, is_done = jax.device_get(_generate(model, n, n_new, params, packed, sample, limits, key))
    kept = len(prompts) * n
    tokens, logprobs, filtered = (x[:kept, :max_new_tokens] for x in output[:3])
    return Generation(tokens, logprobs, filtered, output.n_tokens[:kept], is_done[:kept])


@partial(jax.jit, static_argnames=("model", "n", "n_new"))
def _generate(
    model: Gemma3, n: int, n_new: int, params: Tree, prompts: _Prompts, sample: Sample, limits: _Limits, key: Array
) -> tuple[_Output, Array]:
    """`n` rows for each prompt, and whether each came to a stop token."""
    hidden, cache = prefill(model, params, prompts.tokens, prompts.lengths, n_new)
    hidden, cache, is_real, lengths = jax.tree.map(
        lambda x: jnp.repeat(x, n, axis=0), (hidden, cache, prompts.is_real, prompts.lengths)
    )
    fold = jax.vmap(jax.random.fold_in)
    prompt_keys = jnp.repeat(jax.vmap(partial(jax.random.fold_in, key))(prompts.numbers), n)
    row_keys = fold(prompt_keys, jnp.tile(jnp.arange(n), len(prompts.numbers)))
    slots = slots_of(lengths, prompts.tokens.shape[1], n_new)
    params = decoding_params(model, params)

    def advance(state: _State) -> _State:
        logits = model.unembed(params, state.hidden)
        allowed = jnp.where(limits.is_forbidden[None], -jnp.inf, logits)
        tokens, filtered = draw(sample, allowed, fold(row_keys, lengths + state.step))
        logprobs = _logprobs(logits, tokens, sample.temperature)
        output = _record(state, tokens, logprobs, filtered)
        hidden, cache = decode(model, params, state.cache, slots, tokens, prompts.tokens.shape[1] + state.step)
        return _State(state.step + 1, hidden, cache, state.is_done | limits.is_stop[tokens], output)

    n_rows = len(lengths)
    nothing = jnp.zeros((n_rows, n_new), jnp.float32)
    output = _Output(nothing.astype(jnp.int32), nothing, nothing, jnp.zeros(n_rows, jnp.int32))
    start = _State(jnp.int32(0), hidden, cache, ~is_real, output)
    goes_on = lambda state: (state.step < limits.max_new_tokens) & ~jnp.all(state.is_done)  # noqa: E731
    end = jax.lax.while_loop(goes_on, advance, start)
    return end.output, end.is_done


def _logprobs(logits: Float[Array, "rows vocab"], tokens: Int[Array, "rows"], temperature: Number) -> Array:
    heights = logits / jnp.where(jnp.asarray(temperature) == 0, 1.0, temperature)
    chosen = jnp.take_along_axis(heights, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(heights, axis=-1)


def _record(state: _State, tokens: Array, logprobs: Array, filtered: Array) -> _Output:
    """The output with one more column; rows that are done get 0."""

    def put(into, column):
        column = jnp.where(state.is_done, 0, column)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(into, column, state.step, axis=1)

    new = (tokens, logprobs, filtered)
    tokens, logprobs, filtered = (put(into, column) for into, column in zip(state.output[:3], new, strict=True))
    return _Output(tokens, logprobs, filtered, state.output.n_tokens + ~state.is_done)


def _pack(prompts: Sequence[Sequence[int]], numbers: Sequence[int], n_prompts: int, n_slots: int) -> _Prompts:
    """Right-padded to the bucket; a row that fills it is one token long."""
    tokens = np.zeros((n_prompts, n_slots), np.int32)
    lengths = np.ones(n_prompts, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        lengths[i] = len(prompt)
    row_numbers = np.zeros(n_prompts, np.uint32)
    row_numbers[: len(prompts)] = numbers
    is_real = np.arange(n_prompts) < len(prompts)
    return _Prompts(*map(jnp.asarray, (tokens, lengths, is_real, row_numbers)))


def _is_among(ids: Collection[int], vocab: int) -> Bool[Array, "vocab"]:
    """For every token id whether it is one of `ids`; a tokenizer may know more ids than the model."""
    is_among = np.zeros(vocab, bool)
    is_among[[i for i in ids if 0 <= i < vocab]] = True
    return jnp.asarray(is_among)


def _check(prompts: Sequence[Sequence[int]], n: int, max_new_tokens: int, vocab: int) -> None:
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if not len(prompts):
        raise DataError("there is no prompt to continue")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {number} is empty: it needs at least the BOS token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            wrong = next(i for i in prompt if not 0 <= i < vocab)
            raise DataError(f"prompt {number} holds token {wrong}, and the model's vocabulary ends at {vocab - 1}")
