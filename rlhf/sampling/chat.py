"""A conversation in text: what the user says goes in, the answer comes out in pieces as it is drawn."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from rlhf.data.images import Picture, load_images
from rlhf.model.chat import ChatTemplate, Message, Placed
from rlhf.model.gemma3 import Tree
from rlhf.sampling.methods import Method
from rlhf.sampling.sampler import Completion, Sampler, never_drawn
from rlhf.sampling.schedule import PromptImages
from rlhf.sampling.session import Session
from rlhf.sampling.stops import TextStream
from rlhf.sampling.weights import DecodingWeights


class Chat:
    """One conversation. system: said before the first turn, if not empty. room: see `Session`.

    turns: what was said so far. last: the newest answer. seconds: that it took; n_run: tokens that went through the
    model before it.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Tree,
        *,
        method: Method,
        max_new_tokens: int,
        seed: int = 0,
        stop: Sequence[str] = (),
        system: str = "",
        room: int = 1024,
    ):
        self.sampler, self.stop, self.system = sampler, stop, system
        vision = sampler.model.architecture.vision
        self.vision = vision
        self.template = ChatTemplate(sampler.tokenizer, vision.tokens_per_image if vision else 0)
        self.session = Session(
            sampler.model,
            params,
            method=method,
            key=sampler.key(0, seed),
            stop_ids=sampler.tokenizer.stop_ids,
            max_new_tokens=max_new_tokens,
            forbidden_ids=never_drawn(sampler.tokenizer, sampler.model.architecture.vocab_size),
            room=room,
            weights=DecodingWeights(sampler.model, sampler.settings.weights),
            cache_dtype=sampler.settings.cache_dtype,
        )
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.session.forget()
        self.turns: list[Message] = []
        self._soft_tokens: list[int] = []
        self._pictures: list[Picture] = []
        self.last: Completion | None = None
        self.seconds = 0.0

    @property
    def n_run(self) -> int:
        return self.session.n_run

    def say(self, text: str, pictures: Sequence[Picture] = ()) -> Iterator[str]:
        """The answer to a user's turn, in pieces. pictures: in front of its text; the model must see.

        Raises:
            DataError: a picture can't be read, or the text is none that has tokens.
        """
        started, tokenizer = time.perf_counter(), self.sampler.tokenizer
        turn = Message("user", text, tuple(Placed(0, picture) for picture in pictures))
        tokens, soft_tokens = self._tokens(turn)
        images = self._images(soft_tokens, [*self._pictures, *pictures])
        self.turns.append(turn)
        self.last = None
        self._soft_tokens, self._pictures = soft_tokens, [*self._pictures, *pictures]
        stream, drawn = TextStream(tokenizer, self.stop), self.session.answer(tokens, images)
        n_tokens, reason = 0, "length"
        try:
            for token in drawn:
                n_tokens += 1
                if token.id in tokenizer.stop_ids:
                    reason = "stop"
                    continue
                if piece := stream.add(token.id):
                    yield piece
                if stream.is_stopped:
                    reason = "stop_text"
                    break
            if piece := stream.end():
                yield piece
        finally:  # also of an answer that is interrupted
            drawn.close()  # type: ignore[attr-defined]  # a generator
            self.turns.append(Message("assistant", stream.text))
            self.last, self.seconds = Completion(stream.text, n_tokens, reason), time.perf_counter() - started

    def _tokens(self, turn: Message) -> tuple[list[int], list[int]]:
        """The conversation with one more turn of the user's and the head of an answer, and the soft tokens in it.

        Answers stay as they were drawn; one that did not end by itself is closed.
        """
        tokenizer, before = self.sampler.tokenizer, list(self.session.tokens)
        opening = [Message("system", self.system)] if self.system and not before else []
        rendered = self.template.render([[*opening, turn]], opens_answer=True)[0]
        tokens, soft_tokens = rendered.tokens, list(rendered.soft_tokens) or [0] * len(rendered.tokens)
        if not before:
            return tokens, soft_tokens
        if before[-1] in tokenizer.stop_ids:
            before.pop()
        before += [tokenizer.end_of_turn, *tokenizer.encode("\n")]
        n_before = len(self._pictures) * self.template.tokens_per_image
        told = [number + n_before if number else 0 for number in soft_tokens[1:]]
        silent = [0] * (len(before) - len(self._soft_tokens))
        return before + tokens[1:], self._soft_tokens + silent + told  # one BOS is enough

    def _images(self, soft_tokens: list[int], pictures: Sequence[Picture]) -> PromptImages | None:
        if not pictures or self.vision is None:
            return None
        images = load_images([pictures], len(pictures), self.vision.image_size)[0]
        return PromptImages(np.asarray(soft_tokens, np.int32), images)
