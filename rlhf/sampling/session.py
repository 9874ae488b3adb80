"""One conversation in token ids: what was said before is kept as keys and values, and only what is new is run.

Prompt and answers so far lie in one cache of `room` tokens. For a turn its new tokens are added to it; decoding writes
the answer beside it, as in any generation, and the answer's keys and values are then copied behind the prompt's.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.sampling import programs
from rlhf.sampling.ahead import compile_together
from rlhf.sampling.cache import Pictures
from rlhf.sampling.generate import check_prompts, rules_for, setting_for
from rlhf.sampling.methods import Method, Numbers, numbers_of
from rlhf.sampling.programs import Seats
from rlhf.sampling.schedule import PromptImages
from rlhf.sampling.shapes import Shape, bucket
from rlhf.sampling.weights import DecodingWeights

log = logging.getLogger(__name__)

CHUNK = 32  # new tokens that go through the model at once


class Token(NamedTuple):
    """A drawn token and its log-probability, as `Generation.logprobs` has it."""

    id: int
    logprob: float


class Session:
    """A conversation with one set of parameters.

    room: tokens that there is room for at first; a longer conversation gets twice as much, and is compiled for once
        more. max_new_tokens: of an answer.
    tokens: of the conversation so far, the drawn ones included. n_run: of the last turn's tokens, those that went
        through the model before the answer; the others were kept.
    """

    def __init__(
        self,
        model: Gemma3,
        params: Tree,
        *,
        method: Method,
        key: Key[Array, ""],
        stop_ids: Collection[int],
        max_new_tokens: int,
        forbidden_ids: Collection[int] = (),
        room: int = 1024,
        weights: DecodingWeights | None = None,
        cache_dtype: str | None = None,
    ):
        weights = DecodingWeights(model) if weights is None else weights
        self.vocab = model.architecture.vocab_size
        self.setting, self.weights = setting_for(weights.model, params, cache_dtype), weights.of(params)
        self.rules = rules_for(self.vocab, stop_ids, forbidden_ids, {}, 0, False)
        self.key, self.max_new_tokens = key, max_new_tokens
        self.method = Numbers(*numbers_of([method]))
        self.tokens: list[int] = []
        self.n_run = self._n_kept = 0
        self._make_room(room)

    def _make_room(self, n_tokens: int) -> None:
        """An empty cache for so many tokens, and the programs for it."""
        self.shape = Shape(1, 1, bucket(n_tokens, CHUNK), bucket(self.max_new_tokens, CHUNK))
        self._n_kept = 0
        room = self.shape.prompt_tokens + CHUNK  # the last chunk may begin anywhere
        self._cache = programs.empty_stage(self.setting, 1, room)
        self._prompts, self._answers = programs.empty(self.setting, self.shape)
        setting, number, row = self.setting, np.int32(0), programs.idle_rows(1)
        tokens, seats = np.zeros((1, room), np.int32), Seats(np.int32(1), *np.zeros((2, 1), np.int32))
        short, one = tokens[:, : self.shape.prompt_tokens], np.ones(1, np.int32)
        decode = (self._prompts, self._answers, row, self.rules, self.key, (number, number))
        seconds = compile_together(
            [
                lambda: programs.decode.lower(setting, self.weights, *decode),
                lambda: programs.prefill.lower(
                    setting, self.weights, self._cache, tokens, (number, number), CHUNK, None
                ),
                lambda: programs.seat.lower(setting, self._prompts, self._cache, short, one, seats),
                lambda: programs.keep_answer.lower(setting, self._cache, self._answers, number, number),
            ]
        )
        log.info("a conversation of %s: compiled in %.1f s", self.shape, seconds)

    def answer(self, tokens: Sequence[int], pictures: PromptImages | None = None, every: int = 1) -> Iterator[Token]:
        """Draw an answer to the conversation `tokens`, whole from its beginning, and give its tokens as they come.

        Of what the conversation was after the last answer nothing is run again. Stopping early (closing the iterator)
        keeps what was given. pictures: of the whole conversation; those shown before must be the same. every: tokens
        drawn before one is given.

        Raises:
            DataError: no tokens, or one outside the vocabulary.
        """
        check_prompts([tokens], 1, self.max_new_tokens, self.vocab)
        self._run(list(tokens), pictures)
        row, n_given = self._seated(), 0
        try:
            while row.is_active[0]:
                state = (self._prompts, self._answers, row, self.rules, self.key, (np.int32(0), np.int32(every)))
                self._answers, after = programs.decode(self.setting, self.weights, *state)
                row = jax.tree.map(np.array, jax.device_get(after))
                drawn, scores = jax.device_get((self._answers.tokens, self._answers.scores))
                for place in range(n_given, int(row.steps[0])):
                    n_given = place + 1
                    self.tokens.append(int(drawn[0, place]))
                    yield Token(self.tokens[-1], float(scores[0, place, 0]))
        finally:
            if n_given == row.steps[0]:  # else the ring is past what was given: the answer is run with the next turn
                counts = np.int32(self._n_kept), np.int32(n_given)
                self._cache = programs.keep_answer(self.setting, self._cache, self._answers, *counts)
                self._n_kept += n_given

    def forget(self) -> None:
        """Begin again: nothing that was said is kept."""
        self.tokens, self._n_kept = [], 0

    def _run(self, tokens: list[int], pictures: PromptImages | None) -> None:
        """All but the last of the tokens through the model, as far as their keys and values are not kept."""
        if tokens[: self._n_kept] != self.tokens[: self._n_kept]:
            self._n_kept = 0  # another past: nothing of it is of use
        if len(tokens) + self.max_new_tokens > self.shape.prompt_tokens:
            self._make_room(max(2 * self.shape.prompt_tokens, len(tokens) + self.max_new_tokens))
        self.tokens, chunk, images = tokens, CHUNK, None
        padded = np.zeros((1, self.shape.prompt_tokens + CHUNK), np.int32)
        padded[0, : len(tokens)] = tokens
        if pictures is not None and pictures.soft_tokens[self._n_kept :].any():
            self._n_kept, chunk = 0, padded.shape[1]  # an image's tokens see each other: they go through together
            images = _padded(pictures, chunk)
        self.n_run = len(tokens) - 1 - self._n_kept
        chunks = np.int32(self._n_kept), np.int32(-(-self.n_run // chunk))
        self._cache = programs.prefill(self.setting, self.weights, self._cache, padded, chunks, chunk, images)
        self._n_kept = len(tokens) - 1

    def _seated(self) -> programs.Rows:
        """The conversation in its entry, and the row that answers it."""
        n, room = len(self.tokens), self.shape.prompt_tokens
        tokens = np.zeros((1, room), np.int32)
        tokens[0, :n] = self.tokens
        seats = Seats(np.int32(1), *np.zeros((2, 1), np.int32))
        self._prompts = programs.seat(self.setting, self._prompts, self._cache, tokens, np.full(1, n, np.int32), seats)
        row = programs.idle_rows(1)._replace(method=self.method)
        row.is_active[0], row.last[0], row.most[0] = True, self.tokens[-1], self.max_new_tokens
        return row


def _padded(pictures: PromptImages, time: int) -> Pictures:
    """As many slots as the next power of two, the rest of them black."""
    n = len(pictures.images)
    images = np.zeros((1, 1 << (n - 1).bit_length(), *pictures.images.shape[1:]), pictures.images.dtype)
    images[0, :n] = pictures.images
    soft_tokens = np.zeros((1, time), np.int32)
    soft_tokens[0, : len(pictures.soft_tokens)] = pictures.soft_tokens
    return Pictures(jnp.asarray(soft_tokens), jnp.asarray(images))
