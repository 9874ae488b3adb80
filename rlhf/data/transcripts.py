r"""Dialogues written as one text with `\n\nHuman: ` and `\n\nAssistant: ` in front of the turns, as in hh-rlhf."""

import re

from rlhf.errors import DataError
from rlhf.model.chat import Message, check_turns

_TURN = re.compile(r"\n\n(Human|Assistant):[ \t]?")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether `text` is a dialogue and not one plain answer."""
    return text.lstrip().startswith(("Human:", "Assistant:"))


def parse_transcript(text: str) -> tuple[Message, ...]:
    """The turns of a dialogue, stripped of white space around them.

    Raises:
        DataError: text in front of the first turn, roles that do not alternate from the human on, or an empty turn.
    """
    lead, *rest = _TURN.split("\n\n" + text.lstrip())
    if lead.strip():
        raise DataError(f"there is text in front of the first turn: {lead.strip()[:40]!r}")
    pairs = zip(rest[::2], rest[1::2], strict=True)
    turns = tuple(Message(_ROLE[name], content.strip()) for name, content in pairs)
    check_turns(turns)
    for number, turn in enumerate(turns, start=1):
        if not turn.content:
            what = "the answer" if number == len(turns) else f"turn {number} ({turn.role})"
            raise DataError(f"{what} is empty")
    return turns
