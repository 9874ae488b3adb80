"""Making a row fit: the prompt loses its oldest part, an answer its end."""

from collections.abc import Sequence

from rlhf.errors import DataError
from rlhf.model.chat import ChatTemplate, Message, Rendered


def shorten(
    template: ChatTemplate, conversations: Sequence[Sequence[Message]], max_length: int, is_open: bool
) -> list[Rendered]:
    """Conversations that share their prompt, in at most `max_length` tokens each.

    The prompt gives way first, down to half of the room: its oldest exchanges go (the system message stays), then the
    oldest text tokens of the user turn that is left; its images stay whole. What the answer still has too much is cut
    off at its end, and no end-of-turn token is put there.

    is_open: the conversations are prompts, which end with the head of an answer.

    Raises:
        DataError: max_length leaves no token of the prompt.
    """
    prompt = list(conversations[0] if is_open else conversations[0][:-1])
    answers = [] if is_open else [messages[-1] for messages in conversations]
    n_longest = max((len(_answer(template, answer).tokens) for answer in answers), default=0)
    room = max(max_length - n_longest, max_length if is_open else max_length // 2)
    head = template.render([prompt], opens_answer=True)[0]
    first = 1 if prompt[0].role == "system" else 0
    while len(head.tokens) > room and len(prompt) > first + 1:
        del prompt[first : first + 2]
        head = template.render([prompt], opens_answer=True)[0]
    head = _without_oldest(head, len(head.tokens) - room, template)
    if is_open:
        return [head]
    return [_join(head, _answer(template, answer), max_length) for answer in answers]


def _answer(template: ChatTemplate, answer: Message) -> Rendered:
    """What stands behind the head of the answer's turn; its tokens are marked 1."""
    whole = template.render([(Message("user", ""), answer)])[0]
    start = whole.answer.index(1)
    return Rendered(whole.tokens[start:], whole.answer[start:])


def _without_oldest(head: Rendered, n_cut: int, template: ChatTemplate) -> Rendered:
    if n_cut <= 0:
        return head
    n_header = template.n_header
    frame = len(template.tokenizer.encode("\n\n")) + 1  # of an image, on each side of its soft tokens
    is_image = _grown([number > 0 for number in head.soft_tokens] or [False] * len(head.tokens), frame)
    text = [place for place in range(n_header, len(head.tokens) - template.n_footer) if not is_image[place]]
    if len(text) <= n_cut:
        raise DataError("dataset.max_length leaves no room for the prompt; raise it")
    cut = set(text[:n_cut])

    def kept(values):
        return [value for place, value in enumerate(values) if place not in cut]

    return Rendered(kept(head.tokens), kept(head.answer), kept(head.soft_tokens), head.images)


def _grown(marks: list[bool], reach: int) -> list[bool]:
    """Marks that hold as far as `reach` places from one, too."""
    return [any(marks[max(place - reach, 0) : place + reach + 1]) for place in range(len(marks))]


def _join(head: Rendered, answer: Rendered, max_length: int) -> Rendered:
    last = max(head.answer) + 1
    marks = [last if mark else 0 for mark in answer.answer]
    soft_tokens = [*head.soft_tokens, *[0] * len(answer.tokens)][:max_length] if head.images else ()
    return Rendered(
        (head.tokens + answer.tokens)[:max_length], (head.answer + marks)[:max_length], soft_tokens, head.images
    )
