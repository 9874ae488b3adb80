"""Gemma 3's chat template, in tokens.

    <bos><start_of_turn>user
    {system, blank line}{question}<end_of_turn>
    <start_of_turn>model
    {answer}<end_of_turn>

The parts between control tokens are encoded one by one, never the joined text, so the ids of a prompt are a prefix of
the ids of prompt and answer. The result is token-identical to the published template: turns are stripped of white space
around them; a system message is not, and goes in front of the first user turn.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf.errors import DataError
from rlhf.model.tokenizer import Tokenizer


class Message(NamedTuple):
    """One turn. role: "system", "user" or "assistant"."""

    role: str
    content: str


class Rendered(NamedTuple):
    """Token ids of a conversation, and for each the number of the answer it belongs to.

    answer: 0 outside answers; k at the tokens of the k-th assistant turn and at the `<end_of_turn>` that closes it. The
        line end after that is 0: generation has stopped by then.
    """

    tokens: list[int]
    answer: list[int]


_Part = tuple[str | int, int]  # text to encode or a control id; the number of the answer it belongs to


class ChatTemplate:
    """Turns messages into token ids with the given tokenizer.

    n_header: tokens in front of the text of a prompt's first turn.
    n_footer: tokens behind the text of a prompt's last turn.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
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
        rendered = []
        for plan in plans:
            tokens: list[int] = []
            answer: list[int] = []
            for content, number in plan:
                tokens += encoded[content]
                answer += [number] * len(encoded[content])
            rendered.append(Rendered(tokens, answer))
        return rendered

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
                parts += [(start, 0), (head + text, 0), (end, 0), ("\n", 0)]
            else:
                answer = number // 2 + 1
                parts += [(start, 0), ("model\n", 0), (text, answer), (end, answer), ("\n", 0)]
        return [*parts, (start, 0), ("model\n", 0)] if opens_answer else parts


def check_turns(messages: Sequence[Message]) -> None:
    """Raises DataError unless the roles are: perhaps one system message, then user and assistant in turn."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise DataError("there is no user turn")
    for number, turn in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if turn.role != wanted:
            raise DataError(
                f"roles must alternate user, assistant, ...: turn {number + 1} is {turn.role!r}, not {wanted!r}"
            )
