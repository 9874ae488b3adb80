"""Gemma 3's chat template, in tokens.

    <bos><start_of_turn>user
    {system, blank line}{question}<end_of_turn>
    <start_of_turn>model
    {answer}<end_of_turn>

The parts between control tokens are encoded one by one, never the joined text, so the ids of a prompt are a prefix of
the ids of prompt and answer. The result is token-identical to the published template: turns are stripped of white space
around them; a system message is not, and goes in front of the first user turn.

An image is a token of two line ends, `<start_of_image>`, its soft tokens, `<end_of_image>` and two line ends again. The
line ends are tokens of their own, as in the official library; the published processor, which encodes the joined text,
merges them with line ends beside them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf.errors import DataError
from rlhf.model.tokenizer import Tokenizer


class Placed(NamedTuple):
    """An image in a turn: in front of the character `at` of the content. What it is, is others' business."""

    at: int
    image: Any


class Message(NamedTuple):
    """One turn. role: "system", "user" or "assistant". images: in order; user turns only."""

    role: str
    content: str
    images: tuple[Placed, ...] = ()


class Rendered(NamedTuple):
    """Token ids of a conversation, and for each the number of the answer it belongs to.

    answer: 0 outside answers; k at the tokens of the k-th assistant turn and at the `<end_of_turn>` that closes it. The
        line end after that is 0: generation has stopped by then.
    soft_tokens: 0 for text; i · tokens_per_image + j + 1 for the j-th soft token of image i. Empty without images.
    images: what the soft tokens are of.
    """

    tokens: list[int]
    answer: list[int]
    soft_tokens: list[int] | tuple[()] = ()
    images: tuple[Any, ...] = ()


_IMAGE = -1  # in place of a token id: a whole image
_Part = tuple[str | int, int]  # text to encode, a control id or an image; the number of the answer it belongs to


class ChatTemplate:
    """Turns messages into token ids with the given tokenizer.

    tokens_per_image: soft tokens of an image; 0: there are no images.
    n_header: tokens in front of the text of a prompt's first turn.
    n_footer: tokens behind the text of a prompt's last turn.
    """

    def __init__(self, tokenizer: Tokenizer, tokens_per_image: int = 0):
        self.tokenizer = tokenizer
        self.tokens_per_image = tokens_per_image
        self._turn = (tokenizer.start_of_turn, tokenizer.end_of_turn)
        self.n_header: int = 2 + len(tokenizer.encode("user\n"))  # BOS and start of turn come before
        self.n_footer: int = 2 + len(tokenizer.encode("\n")) + len(tokenizer.encode("model\n"))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to and with `<start_of_turn>model` and its line end: what generation starts from.

        Raises:
            DataError: the roles do not alternate, or the last turn is not the user's.
        """
        if not messages or messages[-1].role != "user":
            raise DataError("a prompt must end with a user turn")
        return self.render([messages], opens_answer=True)[0].tokens

    def conversation(self, messages: Sequence[Message]) -> Rendered:
        """Ids of whole turns, with the answers marked.

        Raises:
            DataError: the roles do not alternate.
        """
        return self.render([messages])[0]

    def render(self, conversations: Sequence[Sequence[Message]], *, opens_answer: bool = False) -> list[Rendered]:
        """Each conversation in tokens, all texts encoded in one call; `opens_answer` appends the head of an answer.

        Raises:
            DataError: the roles of one do not alternate.
        """
        plans = [self._plan(messages, opens_answer) for messages in conversations]
        texts = list({content: None for plan in plans for content, _ in plan if isinstance(content, str)})
        encoded: dict[str | int, list[int]] = dict(zip(texts, self.tokenizer.encode_many(texts), strict=True))
        encoded |= {index: [index] for index in (self.tokenizer.bos, *self._turn)}
        encoded[_IMAGE] = self._image()
        rendered = []
        for plan, messages in zip(plans, conversations, strict=True):
            tokens: list[int] = []
            answer: list[int] = []
            for content, number in plan:
                tokens += encoded[content]
                answer += [number] * len(encoded[content])
            images = tuple(placed.image for message in messages for placed in message.images)
            rendered.append(Rendered(tokens, answer, self._soft_tokens(plan, encoded) if images else (), images))
        return rendered

    def _image(self) -> list[int]:
        """What stands for an image; PAD in the places of its soft tokens."""
        t, gap = self.tokenizer, self.tokenizer.encode("\n\n")
        return [*gap, t.start_of_image, *[t.pad] * self.tokens_per_image, t.end_of_image, *gap]

    def _soft_tokens(self, plan: list[_Part], encoded: dict[str | int, list[int]]) -> list[int]:
        numbers: list[int] = []
        first = 1
        n_before = encoded[_IMAGE].index(self.tokenizer.start_of_image) + 1
        for content, _ in plan:
            start = len(numbers)
            numbers += [0] * len(encoded[content])
            if content == _IMAGE:
                start += n_before
                numbers[start : start + self.tokens_per_image] = range(first, first + self.tokens_per_image)
                first += self.tokens_per_image
        return numbers

    def _plan(self, messages: Sequence[Message], opens_answer: bool) -> list[_Part]:
        check_turns(messages)
        system, turns = ("", messages)
        if messages and messages[0].role == "system":
            system, turns = (messages[0].content + "\n\n", messages[1:])
        start, end = self._turn
        parts: list[_Part] = [(self.tokenizer.bos, 0)]
        for number, turn in enumerate(turns):
            text = turn.content.strip()
            if turn.role == "user":
                head = "user\n" + (system if number == 0 else "")
                parts += [(start, 0), *_with_images(head, turn), (end, 0), ("\n", 0)]
            else:
                answer = number // 2 + 1
                parts += [(start, 0), ("model\n", 0), (text, answer), (end, answer), ("\n", 0)]
        return [*parts, (start, 0), ("model\n", 0)] if opens_answer else parts


def _with_images(head: str, turn: Message) -> list[_Part]:
    """The text of a user turn behind `head`, cut where its images stand."""
    text = turn.content.strip()
    if not turn.images:
        return [(head + text, 0)]
    skipped = len(turn.content) - len(turn.content.lstrip())
    places = [min(max(placed.at - skipped, 0), len(text)) for placed in turn.images]
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    parts: list[_Part] = [(head + pieces[0], 0)]
    for piece in pieces[1:]:
        parts += [(_IMAGE, 0), (piece, 0)]
    return [part for part in parts if part[0] != ""]


def check_turns(messages: Sequence[Message]) -> None:
    """Raises DataError unless the roles are: perhaps one system message, then user and assistant in turn; and images
    in user turns only."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise DataError("there is no user turn")
    for number, turn in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if turn.role != wanted:
            raise DataError(
                f"roles must alternate user, assistant, ...: turn {number + 1} is {turn.role!r}, not {wanted!r}"
            )
    seeing = next((message.role for message in messages if message.images and message.role != "user"), None)
    if seeing is not None:
        raise DataError(f"there is an image in a turn of the {seeing}: images belong into user turns")
