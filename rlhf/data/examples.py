"""What a row says, whatever it looked like: a conversation, a preference, a judged answer or a question.

Also what makes one of them bad, and how one is turned into another. Text only; tokens are `encode.py`'s business.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from rlhf.errors import ConfigError, DataError
from rlhf.model.chat import Message, check_turns
from rlhf.model.tokenizer import refuse_lone_surrogates

Form = Literal["conversation", "preference", "unpaired", "graded", "prompt"]
Messages = tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Whole turns, the last of them an answer."""

    messages: Messages


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the better one first. margin: by how much, where that is known."""

    prompt: Messages
    chosen: str
    rejected: str
    margin: float | None = None


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer, good or bad."""

    prompt: Messages
    answer: str
    is_desirable: bool


@dataclasses.dataclass(frozen=True)
class Scored:
    """One answer and its score."""

    prompt: Messages
    answer: str
    score: float


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt; solution: a full answer; reference: what is checked of it (a number, an option), both if known."""

    prompt: Messages
    solution: str | None = None
    reference: str | None = None


Example = Conversation | Preference | Judged | Scored | Question

PAIR, LABEL, SCORE = 0, 1, 2  # kinds of grades


class Grade(NamedTuple):
    """What a row of the form `graded` says of its answers.

    kind: PAIR: the first of two is better, by `value` (0 where that is not known). LABEL: the only one is good (1) or
    bad (0). SCORE: the only one is worth `value`.
    """

    kind: int
    value: float


def grade_of(example: Example) -> Grade:
    """The grade that an example of the form `graded` gives."""
    match example:
        case Preference(_, _, _, margin):
            return Grade(PAIR, 0.0 if margin is None else margin)
        case Judged(_, _, is_desirable):
            return Grade(LABEL, float(is_desirable))
        case Scored(_, _, score):
            return Grade(SCORE, score)
    raise AssertionError(f"{type(example).__name__} has no grade")


def check(example: Example) -> None:
    """Refuse what can't be trained on.

    Raises:
        DataError: roles that do not alternate, a prompt that does not end with the user, an empty turn or answer,
            a lone surrogate, or two equal answers of which one should be better.
    """
    match example:
        case Conversation(messages):
            _check_messages(messages)
            if messages[-1].role != "assistant":
                raise DataError("the last turn is the user's: there is no answer to learn")
        case Preference(prompt, chosen, rejected, _):
            _check_prompt(prompt)
            _check_answer(chosen, "chosen answer")
            _check_answer(rejected, "rejected answer")
            if chosen.strip() == rejected.strip():
                raise DataError("the chosen and the rejected answer are equal")
        case Judged(prompt, answer, _) | Scored(prompt, answer, _):
            _check_prompt(prompt)
            _check_answer(answer, "answer")
        case Question(prompt, solution, _):
            _check_prompt(prompt)
            if solution is not None:
                _check_answer(solution, "answer")


def _check_prompt(prompt: Messages) -> None:
    _check_messages(prompt)
    if prompt[-1].role != "user":
        raise DataError("the prompt does not end with a user turn")


def _check_messages(messages: Messages) -> None:
    check_turns(messages)
    for number, message in enumerate(messages, start=1):
        if message.content.strip() or not message.images:
            _check_answer(message.content, f"turn {number} ({message.role})")


def _check_answer(text: str, name: str) -> None:
    if not text.strip():
        raise DataError(f"the {name} is empty")
    try:
        refuse_lone_surrogates(text)
    except DataError as error:
        raise DataError(f"the {name}: {error}") from None


def prompt_of(example: Example) -> Messages:
    return example.messages[:-1] if isinstance(example, Conversation) else example.prompt


def with_messages(example: Example, change: Callable[[Messages], Messages]) -> Example:
    """The example with other messages: all of a conversation, else those of its prompt."""
    if isinstance(example, Conversation):
        return Conversation(change(example.messages))
    return dataclasses.replace(example, prompt=change(example.prompt))


def with_system(example: Example, text: str) -> Example:
    """The example with `text` as its system message, unless it has one."""

    def change(messages: Messages) -> Messages:
        return messages if messages[0].role == "system" else (Message("system", text), *messages)

    return with_messages(example, change)


def _first_answers(example: Preference) -> list[Example]:
    return [Conversation((*example.prompt, Message("assistant", example.chosen)))]


def _both_answers(example: Preference) -> list[Example]:
    return [Judged(example.prompt, example.chosen, True), Judged(example.prompt, example.rejected, False)]


def _unchanged(example: Example) -> list[Example]:
    return [example]


def _worked(example: Question) -> list[Example]:
    if example.solution is None:
        raise DataError("the row has a prompt but no answer to train on")
    return [Conversation((*example.prompt, Message("assistant", example.solution)))]


def _prompt_alone(example: Example) -> list[Example]:
    return [Question(prompt_of(example))]


# (form of the rows, form asked for) -> what is done, and how
_CONVERSIONS: dict[tuple[Form, Form], tuple[str, Callable[..., list[Example]]]] = {
    ("preference", "conversation"): ("the chosen answers are trained on, the rejected ones left out", _first_answers),
    ("preference", "unpaired"): ("chosen answers count as desirable, rejected ones as undesirable", _both_answers),
    ("preference", "prompt"): ("both answers are left out", _prompt_alone),
    ("conversation", "prompt"): ("the last answer is left out", _prompt_alone),
    ("prompt", "conversation"): ("question and answer are one exchange", _worked),
    ("unpaired", "prompt"): ("the answers are left out", _prompt_alone),
    ("preference", "graded"): ("the chosen answer is better than the rejected one", _unchanged),
    ("unpaired", "graded"): ("an answer is good or bad", _unchanged),
    ("graded", "prompt"): ("the answers and their scores are left out", _prompt_alone),
}


def check_conversion(source: Form, wanted: Form) -> str | None:
    """What has to be done to rows of one form to get another; None: nothing.

    Raises:
        ConfigError: it can't be done.
    """
    if source == wanted:
        return None
    if (source, wanted) not in _CONVERSIONS:
        possible = sorted(f"{have}s" for have, asked in _CONVERSIONS if asked == wanted)
        others = f", or of {' or '.join(possible)}, which can be turned into them" if possible else ""
        raise ConfigError(
            f"the algorithm trains on rows of form {wanted!r}, but this dataset has rows of form {source!r}, from "
            f"which they can't be made: choose a dataset of {wanted}s{others}"
        )
    return _CONVERSIONS[source, wanted][0]


def convert(example: Example, source: Form, wanted: Form) -> Sequence[Example]:
    """The examples of form `wanted` that an example of form `source` gives.

    Raises:
        DataError: this one lacks what is needed.
    """
    return [example] if source == wanted else _CONVERSIONS[source, wanted][1](example)
