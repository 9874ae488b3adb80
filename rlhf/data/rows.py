"""Field maps: from the columns of a row to an example.

One class for each shape that rows come in. Their settings name the columns, and reach a yaml as `dataset.rows`.
"""

import difflib
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from rlhf.config import config
from rlhf.data.examples import Conversation, Example, Form, Judged, Messages, Preference, Question, Scored
from rlhf.data.pictures import image_of_part
from rlhf.data.transcripts import is_transcript, parse_transcript
from rlhf.errors import ConfigError, DataError
from rlhf.model.chat import Message, Placed

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
}
_LARGEST = 1e18  # of a score or margin: losses square them in float32, which ends at 3.4e38
_OPEN_ANSWER = re.compile(r"\n\nAssistant:\s*$")


@config
class RowFormat:
    """Turns the fields of a row into an example of one form.

    images: the column of an image, or a list of them: they go to the places that messages leave for them, or in front
        of the first user turn; null: `image` or `images`, where a row has it.

    Raises:
        DataError: (when called) the reason why the row can't be used; the caller adds file and line.
    """

    form: ClassVar[Form]

    images: str | None = None

    def __call__(self, fields: Mapping[str, Any]) -> Example:
        raise NotImplementedError


@config
class Conversations(RowFormat):
    """Rows with a list of messages.

    messages: the column.
    role, content: the two keys of each message.
    """

    form = "conversation"

    messages: str = "messages"
    role: str = "role"
    content: str = "content"

    def __call__(self, fields):
        return Conversation(read_messages(take(fields, self.messages), self.messages, self.role, self.content))


@config
class Preferences(RowFormat):
    r"""Rows with a better and a worse answer.

    chosen, rejected: their columns: message lists or `\n\nHuman:` text, whole dialogues that differ in the last turn
        only; or, with `prompt`, the answers alone.
    prompt: the column of what both answer: text, `\n\nHuman:` text or a message list; null: it is what they share.
    margin: the column of how much better the chosen one is, or the two columns of what chosen and rejected are worth;
        null: it is not known.
    role, content: the two keys of each message.
    """

    form = "preference"

    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str | None = None
    margin: str | tuple[str, str] | None = None
    role: str = "role"
    content: str = "content"

    def __call__(self, fields):
        shared = self._prompt(fields)
        chosen = self._dialogue(fields, self.chosen, shared)
        rejected = self._dialogue(fields, self.rejected, shared)
        if chosen[:-1] != rejected[:-1]:
            turn = _first_difference(chosen, rejected)
            raise DataError(
                f"{self.chosen!r} and {self.rejected!r} differ before the last answer, at turn {turn}: "
                "there is no shared prompt"
            )
        return Preference(chosen[:-1], chosen[-1].content, rejected[-1].content, self._margin(fields))

    def _margin(self, fields: Mapping[str, Any]) -> float | None:
        if self.margin is None:
            return None
        columns = (self.margin,) if isinstance(self.margin, str) else self.margin
        values = [_number(take(fields, column), f"column {column!r}") for column in columns]
        return values[0] if len(values) == 1 else values[0] - values[1]

    def _prompt(self, fields: Mapping[str, Any]) -> Messages:
        if self.prompt is None:
            return ()
        return read_prompt(take(fields, self.prompt), self.prompt, self.role, self.content)

    def _dialogue(self, fields: Mapping[str, Any], column: str, prompt: Messages) -> Messages:
        value = take(fields, column)
        if isinstance(value, str) and not is_transcript(value):
            if not prompt:
                raise DataError(
                    rf"column {column!r} is text without '\n\nHuman:' turns, and no column is named as the prompt: "
                    "set dataset.rows.prompt"
                )
            return (*prompt, Message("assistant", value))
        turns = _in_column(column, parse_transcript, value) if isinstance(value, str) else self._list(value, column)
        if prompt and turns[0].role == "assistant":
            turns = (*prompt, *turns)
        elif prompt and not _holds(turns, prompt):
            raise DataError(f"the dialogue in column {column!r} does not hold the prompt in column {self.prompt!r}")
        if turns[-1].role != "assistant":
            raise DataError(f"column {column!r} ends with a {turns[-1].role} turn: there is no answer")
        return turns

    def _list(self, value: Any, column: str) -> Messages:
        return read_messages(value, column, self.role, self.content)


@config
class Judgements(RowFormat):
    """Rows with one answer and whether it is good.

    prompt: the column of the question: text or a message list.
    answer: the column of the answer, as text or a list of one message.
    label: the column of the judgement: true or false, 1 or 0.
    """

    form = "unpaired"

    prompt: str = "prompt"
    answer: str = "completion"
    label: str = "label"

    def __call__(self, fields):
        label = take(fields, self.label)
        if not isinstance(label, bool | int) or label not in (0, 1):
            raise DataError(f"column {self.label!r} must be true or false, not {_shown(label)}")
        answer = _single_answer(take(fields, self.answer), self.answer)
        return Judged(read_prompt(take(fields, self.prompt), self.prompt, "role", "content"), answer, bool(label))


@config
class Scores(RowFormat):
    """Rows with one answer and what it is worth.

    prompt: the column of the question: text or a message list.
    answer: the column of the answer, as text or a list of one message.
    score: the column of the number.
    """

    form = "graded"

    prompt: str = "prompt"
    answer: str = "completion"
    score: str = "score"

    def __call__(self, fields):
        score = _number(take(fields, self.score), f"column {self.score!r}")
        answer = _single_answer(take(fields, self.answer), self.answer)
        return Scored(read_prompt(take(fields, self.prompt), self.prompt, "role", "content"), answer, score)


@config
class Questions(RowFormat):
    """Rows with a question and, perhaps, its answer.

    question: the column of the question: text or a message list.
    answer: the column of the answer; null: there is none.
    answer_pattern: a regular expression; its last match in the answer (the first group, if it has one) is the reference
        that generated answers are compared with. null: the whole answer.
    """

    form = "prompt"

    question: str = "question"
    answer: str | None = None
    answer_pattern: str | None = None

    def __post_init__(self):
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise ConfigError(
                    f"dataset.rows.answer_pattern={self.answer_pattern!r} is no regular expression: {error}"
                ) from None

    def __call__(self, fields):
        prompt = read_prompt(take(fields, self.question), self.question, "role", "content")
        if self.answer is None:
            return Question(prompt)
        value = take(fields, self.answer)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not abs(value) <= sys.float_info.max:
            raise DataError(f"column {self.answer!r} is {_shown(value)}, no number to compare with: no finite float")
        solution = str(value) if is_number else _text(value, f"column {self.answer!r}")
        return Question(prompt, solution, self._reference(solution))

    def _reference(self, solution: str) -> str:
        if self.answer_pattern is None:
            return solution.strip()
        matches = list(re.finditer(self.answer_pattern, solution))
        if not matches:
            raise DataError(f"column {self.answer!r} has nothing that matches answer_pattern {self.answer_pattern!r}")
        return (matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()).strip()


def take(fields: Mapping[str, Any], column: str) -> Any:
    """The value of a column; a missing one is an error that names the nearest."""
    if column in fields and fields[column] is not None:
        return fields[column]
    if column in fields:
        raise DataError(f"column {column!r} is null")
    near = difflib.get_close_matches(column, fields, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "; dataset.rows says which column holds what"
    raise DataError(f"there is no column {column!r} (there are: {', '.join(map(str, fields)) or 'none'}){hint}")


def read_prompt(value: Any, column: str, role: str, content: str) -> Messages:
    r"""A prompt given as text (one user turn), as `\n\nHuman:` text or as a message list."""
    if isinstance(value, str):
        if is_transcript(value):
            return _in_column(column, parse_transcript, _OPEN_ANSWER.sub("", value))
        return (Message("user", value),)
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r} must be text or a list of messages, not {_shown(value)}")
    return read_messages(value, column, role, content)


def read_messages(value: Any, column: str, role: str, content: str) -> Messages:
    """A list of {role, content}; an empty system message is left out, since it says nothing."""
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r} must be a list of messages, not {_shown(value)}")
    if not value:
        raise DataError(f"column {column!r} is an empty list")
    messages = tuple(
        _message(item, f"message {number} of column {column!r}", role, content)
        for number, item in enumerate(value, start=1)
    )
    is_silent = messages[0].role == "system" and not messages[0].content.strip()
    if is_silent and len(messages) == 1:
        raise DataError(f"column {column!r} holds nothing but an empty system message")
    return messages[1:] if is_silent else messages


def _message(item: Any, name: str, role: str, content: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{name} must be an object with {role!r} and {content!r}, not {_shown(item)}")
    for key in (role, content):
        if key not in item:
            raise DataError(f"{name} has no {key!r} (it has: {', '.join(map(str, item))})")
    speaker = item[role]
    if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
        raise DataError(f"{name} has the role {_shown(speaker)}; known are {', '.join(_ROLES)}")
    message = Message(_ROLES[speaker.lower()], *_content(item[content], name))
    if message.images and message.role != "user":
        raise DataError(f"{name} is of the {message.role} and has an image: images belong into user turns")
    return message


def _content(value: Any, name: str) -> tuple[str, tuple[Placed, ...]]:
    """Text, or a list of parts: {"type": "text", "text": ...}, each stripped as the published template does, and
    {"type": "image"}, whose image is None where the row's own are meant."""
    if not isinstance(value, list | tuple):
        return _text(value, f"the content of {name}"), ()
    text, images = "", []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text += _text(part.get("text"), f"a part of {name}").strip()
        elif kind in ("image", "image_url"):
            images.append(Placed(len(text), image_of_part(part)))
        else:
            raise DataError(f"{name} has a part of type {_shown(kind)}; known are text and image")
    return text, tuple(images)


def _single_answer(value: Any, column: str) -> str:
    """An answer given as text or as a list of one message."""
    if isinstance(value, list):
        turns = read_messages(value, column, "role", "content")
        if len(turns) != 1 or turns[0].role != "assistant":
            raise DataError(f"column {column!r} must hold one assistant message, not {len(turns)} messages")
        value = turns[0].content
    return _text(value, f"column {column!r}")


def _number(value: Any, name: str) -> float:
    """A score or margin. Compared, not made a float: an integer may be too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise DataError(f"{name} must be a finite number, not {_shown(value)}")
    if abs(value) > _LARGEST:
        raise DataError(f"{name} must be within ±{_LARGEST:g}, so that float32 holds its square, not {_shown(value)}")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, not {_shown(value)}")
    return value


def _in_column(column: str, parse: Any, value: str) -> Messages:
    try:
        return parse(value)
    except DataError as error:
        raise DataError(f"column {column!r}: {error}") from None


def _holds(turns: Messages, prompt: Messages) -> bool:
    said = [turn.content.strip() for turn in turns]
    asked = [turn.content.strip() for turn in prompt]
    return any(said[start : start + len(asked)] == asked for start in range(len(said) - len(asked) + 1))


def _first_difference(chosen: Messages, rejected: Messages) -> int:
    pairs = enumerate(zip(chosen, rejected, strict=False), start=1)
    return next((number for number, (one, other) in pairs if one != other), min(len(chosen), len(rejected)) + 1)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
