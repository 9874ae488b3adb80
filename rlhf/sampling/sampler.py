"""Prompts in, texts out, with everything that a trainer wants to know of them: what a run generates with."""

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from rlhf.config import Number
from rlhf.data.images import load_images
from rlhf.errors import DataError
from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.model.sharding import whole
from rlhf.model.tokenizer import Tokenizer
from rlhf.sampling.ahead import compile_ahead, compile_in_background
from rlhf.sampling.beam import beam_search
from rlhf.sampling.generate import Generation, generate, rules_for, setting_for
from rlhf.sampling.methods import Beam, Method
from rlhf.sampling.schedule import PromptImages
from rlhf.sampling.settings import SamplingSettings
from rlhf.sampling.shapes import Shape, Use, cheapest, planned, shape_for
from rlhf.sampling.side_by_side import parts_of
from rlhf.sampling.stops import first_stop, stop_watch
from rlhf.sampling.weights import DecodingWeights

log = logging.getLogger(__name__)


@runtime_checkable
class Prompt(Protocol):
    """What is read of a prompt.

    answer: the reference, if any. fields: the dataset's row. row: its index there, on which the noise depends.
    soft_tokens, pictures: as `rlhf.data.encode.Prompt` has them; empty without images.
    """

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def answer(self) -> str | None: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...
    @property
    def row(self) -> int: ...
    @property
    def soft_tokens(self) -> Sequence[int]: ...
    @property
    def pictures(self) -> Sequence[Any]: ...


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    text: without control tokens, cut where a stop text begins. n_tokens: with the stop token. finish_reason: `stop`
    (a stop token), `stop_text`, or `length` (cut at `max_new_tokens`).
    """

    text: str
    n_tokens: int
    finish_reason: str = "stop"

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclasses.dataclass(frozen=True)
class Rollout:
    """`n` answers to each prompt: number i * n + j of completions, and row of `generation`, is the j-th to prompt i.

    seconds: wall time of generating.
    """

    completions: list[Completion]
    generation: Generation
    n: int
    seconds: float

    @property
    def texts(self) -> list[str]:
        return [completion.text for completion in self.completions]

    def metrics(self) -> dict[str, float]:
        """`sampling/…` numbers for the log (docs/metrics.md defines them)."""
        tokens = self.generation.n_tokens
        return {
            "sampling/mean_tokens": float(np.mean(tokens)),
            "sampling/truncated": float(np.mean([completion.is_truncated for completion in self.completions])),
            "sampling/utilisation": self.generation.utilisation,
            "sampling/seconds": self.seconds,
            "sampling/tokens_per_second": float(np.sum(tokens)) / self.seconds,
        }


class Sampler:
    """A model and its tokenizer, ready to answer.

    Parameters in the layout of decoding, which are a second copy of the layers, are let go of after each call.
    shapes: which calls may be compiled for, the cheapest of them that fits; none: each for its own.
    seed: of the noise, with the step, the prompt's row, the number of the answer and the place of the token.
    """

    def __init__(self, model: Gemma3, tokenizer: Tokenizer, settings: SamplingSettings | None = None, seed: int = 0):
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.settings = SamplingSettings() if settings is None else settings
        self.weights = DecodingWeights(model, self.settings.weights)
        self.shapes: list[Shape] = []

    def expect(self, *uses: Use) -> None:
        """Plan for what will be asked: calls then take the cheapest planned shape that fits, and few are compiled."""
        self.shapes = planned(self.shapes, uses)

    def warm_up(self, params: Tree, *uses: Use, in_background: bool = False) -> None:
        """`expect`, and compile all that is planned: nothing that was announced compiles later.

        in_background: but for the first shape, while this thread goes on. It pays where the processor that compiles has
        nothing else to do, so not on a CPU that generates too.
        """
        self.expect(*uses)
        vocab, layers = self.model.architecture.vocab_size, self.weights.of(params)
        never = never_drawn(self.tokenizer, vocab)
        rules = rules_for(vocab, self.tokenizer.stop_ids, never, {}, 0, False)
        setting = setting_for(self.weights.model, params, self.settings.cache_dtype)
        most = max((use.n_images for use in uses), default=0)
        images = [0] + [1 << power for power in range((most - 1).bit_length() + 1) if most]
        work = [
            functools.partial(compile_ahead, setting, parts_of(setting, shape, layers), layers, rules, self.key(0), n)
            for shape in self.shapes
            for n in images
        ]
        work[0]()
        if in_background:
            compile_in_background(work[1:])
        else:
            for compile_one in work[1:]:
                compile_one()
        self.weights.release()

    def __call__(
        self,
        params: Tree,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        method: Method | Sequence[Method],
        max_new_tokens: int | Sequence[int],
        step: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        shape: Shape | None = None,
        **settings: Any,
    ) -> Rollout:
        """`n` answers to each prompt; each ends at EOS, `<end_of_turn>`, one of the texts `stop`, or `max_new_tokens`.

        No other control token is ever drawn: none is part of an answer. method: one for all prompts, or one for each.
        shape: compile for it instead of a planned one or the call's own. settings: further arguments of `generate`,
        such as min_new_tokens, bias, wants_entropy, n_alternatives, slots.

        Raises:
            DataError, ConfigError: as `generate`.
        """
        started = time.perf_counter()
        if shape is None and self.shapes and not isinstance(method, Beam):
            shape = self._shape(prompts, n, max_new_tokens, settings)
        common: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop_ids": self.tokenizer.stop_ids,
            "forbidden_ids": never_drawn(self.tokenizer, self.model.architecture.vocab_size),
            "pictures": images_of(prompts, self.model),
            "weights": self.weights,
            "cache_dtype": self.settings.cache_dtype,
        }
        tokens = [prompt.token_ids for prompt in prompts]
        if isinstance(method, Beam):
            generation = beam_search(self.model, params, tokens, method=method, **common)
        else:
            generation = generate(
                self.model,
                params,
                tokens,
                n=n,
                method=method,
                key=self.key(step, seed),
                watch=stop_watch(self.tokenizer, stop),
                rows=[prompt.row for prompt in prompts],
                shape=shape,
                **{"slots": self.settings.slots, **common, **settings},
            )
        self.weights.release()
        completions = [
            Completion(self._text(ids, stop if reason == "stop_text" else ()), int(length), reason)
            for ids, length, reason in zip(
                generation.answers(), generation.n_tokens, generation.finish_reasons, strict=True
            )
        ]
        return Rollout(completions, generation, len(completions) // len(prompts), time.perf_counter() - started)

    def _shape(
        self, prompts: Sequence[Prompt], n: int, max_new_tokens: int | Sequence[int], settings: Mapping[str, Any]
    ) -> Shape | None:
        """The planned shape for a call; None, with the reason in the log, where none fits."""
        most = max_new_tokens if isinstance(max_new_tokens, int) else max(max_new_tokens, default=1)
        longest = max((len(prompt.token_ids) for prompt in prompts), default=1)
        slots = settings.get("slots", self.settings.slots)
        own = shape_for(len(prompts), n, longest, most, slots, settings.get("n_alternatives", 0) > 0)
        # What is announced is what fits: a number of tokens inside a bucket that is planned needs no bucket of its own.
        least = dataclasses.replace(own, prompt_tokens=longest, new_tokens=most)
        found = cheapest(self.shapes, least, len(prompts), n, max(slots, own.rows))
        if found is None:
            known = "; ".join(map(str, self.shapes))
            log.warning("generation for %s was not planned, so it is compiled for itself; planned: %s", own, known)
        return found

    def key(self, step: int, seed: int | None = None) -> Key[Array, ""]:
        """What the noise of a step depends on."""
        return jax.random.fold_in(jax.random.key(self.seed if seed is None else seed), step)

    def _text(self, ids: list[int], stops: Sequence[str]) -> str:
        text = self.tokenizer.decode(ids)
        return text[: first_stop(text, stops)]

    def difference(self, params: Tree, prompts: Sequence[Prompt], rollout: Rollout, temperature: Number = 1.0) -> float:
        """`sampling/logp_difference`: how far the log-probabilities of generation are from the trainer's, as the mean
        of the absolute differences over all answer tokens, nats. temperature: of the rollout (1 for greedy answers).
        """
        batch = _scored_rows(prompts, rollout)
        trained = np.asarray(whole(_token_logprobs(self.model, params, batch, np.float32(temperature))))
        total = 0.0
        for row, n in enumerate(rollout.generation.n_tokens):
            start = len(prompts[row // rollout.n].token_ids)
            total += float(np.abs(trained[row, start : start + n] - rollout.generation.logprobs[row, :n]).sum())
        return total / float(rollout.generation.n_tokens.sum())


@functools.partial(jax.jit, static_argnums=0)
def _token_logprobs(model: Gemma3, params: Tree, batch: Tree, temperature: Array) -> Float[Array, "rows time"]:
    return model.token_logprobs(params, batch, temperature)


def _scored_rows(prompts: Sequence[Prompt], rollout: Rollout) -> dict[str, np.ndarray]:
    """Prompts with their answers, as a batch of the trainer's."""
    if any(prompt.pictures for prompt in prompts):
        raise DataError("the difference of log-probabilities is measured on prompts without images")
    answers = rollout.generation
    width = max(len(prompt.token_ids) for prompt in prompts) + answers.tokens.shape[1]
    batch = {name: np.zeros((len(answers.tokens), width), np.int32) for name in ("tokens", "segments", "positions")}
    for row, (tokens, n) in enumerate(zip(answers.tokens, answers.n_tokens, strict=True)):
        ids = (*prompts[row // rollout.n].token_ids, *tokens[:n])
        batch["tokens"][row, : len(ids)] = ids
        batch["segments"][row, : len(ids)] = 1
        batch["positions"][row, : len(ids)] = np.arange(len(ids))
    return batch


@functools.lru_cache(maxsize=8)
def never_drawn(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Ids that are no part of an answer: control tokens, other than those that end it, and ids without a piece."""
    return tuple(i for i in range(vocab_size) if tokenizer.is_control(i) and i not in tokenizer.stop_ids)


def images_of(prompts: Sequence[Prompt], model: Gemma3) -> list[PromptImages | None] | None:
    """The images of each prompt as arrays; None if no prompt has any.

    Raises:
        DataError: a prompt has an image and the model reads text only, or an image can't be read.
    """
    if not any(prompt.pictures for prompt in prompts):
        return None
    vision = model.architecture.vision
    if vision is None:
        raise DataError("a prompt has an image, and the model reads text only")
    found: list[PromptImages | None] = []
    for prompt in prompts:
        if not prompt.pictures:
            found.append(None)
            continue
        images = load_images([prompt.pictures], len(prompt.pictures), vision.image_size)[0]
        found.append(PromptImages(np.asarray(prompt.soft_tokens, np.int32), images))
    return found


def show_prompt(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """The prompt as the model sees it, control tokens spelt out."""
    return tokenizer.decode(prompt.token_ids, show_control=True)
