"""Examples to token ids with masks, once. Which tokens count is decided here and nowhere later."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from rlhf.data import joint
from rlhf.data.examples import PAIR, Conversation, Example, Form, Grade, Judged, Preference, Question, Scored, grade_of
from rlhf.data.fingerprint import fingerprint_of
from rlhf.data.images import Picture
from rlhf.data.packing import pack
from rlhf.data.truncate import shorten
from rlhf.errors import DataError
from rlhf.model.chat import ChatTemplate, Message, Rendered
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision

log = logging.getLogger(__name__)

TWO_SIDED: tuple[Form, ...] = ("preference", "graded")  # forms whose rows have a chosen and a rejected answer
ROUND_TO = 16  # the time axis is a multiple of this, so that one shape serves a run
SCORED_SHARE = 0.9  # of a row: with more of it scored, choosing the tokens costs what it saves
CHUNK = 8192  # examples whose ids are Python integers at the same time, each nine times the size of an array's


@runtime_checkable
class Settings(Protocol):
    """The settings of a dataset that matter here; see `rlhf.data.dataset.Dataset`."""

    @property
    def max_length(self) -> int: ...
    @property
    def on_long(self) -> str: ...
    @property
    def loss_on(self) -> str: ...
    @property
    def packing(self) -> bool: ...
    @property
    def share_prompt(self) -> bool: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where an example comes from. place: for messages; fields: the raw row, of prompts and of evaluation rows."""

    place: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRow:
    """One token row.

    n_prompt: tokens in front of the last answer.
    soft_tokens: 0 for text; i · tokens_per_image + j + 1 for the j-th soft token of image i. None: there are no images.
    """

    tokens: Int32[np.ndarray, "time"]
    is_answer: Bool[np.ndarray, "time"]
    n_prompt: int
    soft_tokens: Int32[np.ndarray, "time"] | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    token_ids: up to and with the head of the answer's turn.
    answer: reference that generated answers are compared with, or None.
    fields: the raw row.
    row: its index in the dataset.
    soft_tokens: as in `TokenRow`; empty without images.
    pictures: its images; `rlhf.data.images.load_images` makes them arrays.
    """

    token_ids: tuple[int, ...]
    answer: str | None
    fields: dict[str, Any]
    row: int
    soft_tokens: tuple[int, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclasses.dataclass(frozen=True)
class Examples:
    """A split, encoded.

    sequences: one for each example (for a preference two: chosen and rejected; for a prompt the prompt).
    packs: the examples that share a row of a batch; one each unless packed.
    prompts: of the form "prompt": one for each example.
    is_desirable: of the form "unpaired": one for each example.
    grades: of the form "graded": one for each example.
    sources: one for each example.
    pictures: of each example, in the order of its soft tokens; both answers to a prompt have the same.
    n_slots: pictures that a row of a batch has room for; 0: there are none.
    vision: the tower that they are for.
    n_time: length of the time axis of every batch.
    n_joint: of a preference's row that holds what chosen and rejected begin with once (`joint.py`); None: none is made.
    pad: the token that fills it.
    n_dropped, n_truncated: examples longer than max_length that were left out, or cut.
    fingerprint: changes when any token, mask or the packing does; kept beside checkpoints.
    """

    form: Form
    sequences: list[tuple[TokenRow, ...]]
    packs: list[tuple[int, ...]]
    prompts: list[Prompt]
    is_desirable: list[bool]
    grades: list[Grade]
    sources: list[Source]
    pictures: list[tuple[Picture, ...]]
    n_slots: int
    vision: Vision | None
    n_time: int
    n_joint: int | None
    pad: int
    n_dropped: int
    n_truncated: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.sequences)

    @functools.cached_property
    def is_mixed(self) -> bool:
        """Whether some rows hold a single answer where others hold two."""
        return any(grade.kind != PAIR for grade in self.grades)

    @functools.cached_property
    def n_scored(self) -> int | None:
        """Tokens of a row that a batch has scored: as many as the longest answers have; None where that is most of the
        row, or no token of it has a log-probability."""
        if self.form in ("prompt", "graded"):
            return None
        answers = [max(int(row.is_answer.sum()) for row in rows) for rows in self.sequences]
        n = _rounded(max(1, *(sum(answers[index] for index in pack) for pack in self.packs)))
        return n if n <= SCORED_SHARE * self.n_time else None


def encode(
    found: Sequence[tuple[Source, Example]],
    form: Form,
    tokenizer: Tokenizer,
    settings: Settings,
    name: str,
    vision: Vision | None = None,
) -> Examples:
    """Encode the examples of a split; `name` is its name in the log. vision: the tower that sees its images.

    Raises:
        DataError: an example longer than max_length (if that is an error), or none left.
    """
    template = ChatTemplate(tokenizer, vision.tokens_per_image if vision else 0)
    never = (tokenizer.start_of_image, tokenizer.end_of_image)
    kept: list[tuple[Source, Example]] = []
    rows: list[tuple[TokenRow, ...]] = []
    pictures: list[tuple[Picture, ...]] = []
    n_dropped = n_truncated = 0
    for (source, example), group, whole in _rendered(found, template, form):
        longest = max(len(one.tokens) for one in whole)
        if longest > settings.max_length:
            if settings.on_long == "drop":
                n_dropped += 1
                continue
            if settings.on_long == "error":
                raise DataError(_too_long(source.place, longest, settings.max_length))
            n_truncated += 1
            whole = shorten(template, group, settings.max_length, is_open=form == "prompt")
        kept.append((source, example))
        rows.append(tuple(_token_row(one, form, settings.loss_on, never) for one in whole))
        pictures.append(whole[0].images)
    if not rows:
        raise DataError(
            f"all {n_dropped} rows for {name} are longer than dataset.max_length={settings.max_length} tokens; "
            "raise it, or set dataset.on_long=truncate"
        )
    examples = _assemble(kept, rows, pictures, form, tokenizer, settings, (n_dropped, n_truncated), vision)
    _report(examples, settings, name)
    return examples


def _rendered(
    found: Sequence[tuple[Source, Example]], template: ChatTemplate, form: Form
) -> Iterator[tuple[tuple[Source, Example], list[tuple[Message, ...]], list[Rendered]]]:
    """Each example with the messages of its token rows, and those in tokens; rendered some thousands at a time."""
    for start in range(0, len(found), CHUNK):
        chunk = found[start : start + CHUNK]
        groups = [_conversations(example) for _, example in chunk]
        flat = iter(
            template.render([messages for group in groups for messages in group], opens_answer=form == "prompt")
        )
        for pair, group in zip(chunk, groups, strict=True):
            yield pair, group, [next(flat) for _ in group]


def _conversations(example: Example) -> list[tuple[Message, ...]]:
    """The messages of each token row of an example."""
    match example:
        case Conversation(messages):
            return [messages]
        case Preference(prompt, chosen, rejected, _):
            return [(*prompt, Message("assistant", answer)) for answer in (chosen, rejected)]
        case Judged(prompt, answer, _) | Scored(prompt, answer, _):
            return [(*prompt, Message("assistant", answer))]
        case Question(prompt, _, _):
            return [prompt]


def _token_row(rendered: Rendered, form: Form, loss_on: str, never: tuple[int, ...]) -> TokenRow:
    """never: tokens that are not trained on, wherever they are."""
    tokens = np.array(rendered.tokens, np.int32)
    answer = np.array(rendered.answer, np.int32)
    soft_tokens = np.array(rendered.soft_tokens, np.int32) if rendered.images else None
    if form == "prompt":
        return TokenRow(tokens, np.zeros(len(tokens), bool), len(tokens), soft_tokens)
    last = answer.max()
    n_prompt = int(np.argmax(answer == last))
    if form != "conversation" or loss_on == "last":
        is_answer = answer == last
    elif loss_on == "assistant":
        is_answer = answer > 0
    else:
        is_answer = np.arange(len(tokens)) > 0  # nothing comes before BOS to predict it from
        if soft_tokens is not None:
            is_answer &= (soft_tokens == 0) & ~np.isin(tokens, never)
    return TokenRow(tokens, is_answer, n_prompt, soft_tokens)


def _assemble(
    kept: list[tuple[Source, Example]],
    rows: list[tuple[TokenRow, ...]],
    pictures: list[tuple[Picture, ...]],
    form: Form,
    tokenizer: Tokenizer,
    settings: Settings,
    n_long: tuple[int, int],
    vision: Vision | None,
) -> Examples:
    if settings.packing and form == "conversation":
        packs = pack([len(row.tokens) for (row,) in rows], settings.max_length)
    else:
        packs = [(index,) for index in range(len(rows))]
    longest = max(sum(max(len(row.tokens) for row in rows[index]) for index in group) for group in packs)
    prompts = [
        Prompt(
            tuple(row[0].tokens.tolist()),
            example.reference,
            source.fields,
            index,
            () if row[0].soft_tokens is None else tuple(row[0].soft_tokens.tolist()),
            pictures[index],
        )
        for index, ((source, example), row) in enumerate(zip(kept, rows, strict=True))
        if isinstance(example, Question)
    ]
    is_desirable = [example.is_desirable for _, example in kept if isinstance(example, Judged)]
    grades = [grade_of(example) for _, example in kept] if form == "graded" else []
    n_time = min(settings.max_length, _rounded(longest))
    return Examples(
        form=form,
        sequences=rows,
        packs=packs,
        prompts=prompts,
        is_desirable=is_desirable,
        grades=grades,
        sources=[source for source, _ in kept],
        pictures=pictures,
        n_slots=max(sum(len(pictures[index]) for index in group) for group in packs),
        vision=vision,
        n_time=n_time,
        n_joint=_joint_time(rows, n_time) if settings.share_prompt and form in TWO_SIDED else None,
        pad=tokenizer.pad,
        n_dropped=n_long[0],
        n_truncated=n_long[1],
        fingerprint=fingerprint_of(form, rows, packs, is_desirable, grades, pictures),
    )


def _rounded(n_tokens: int) -> int:
    return -(-n_tokens // ROUND_TO) * ROUND_TO


def _joint_time(rows: list[tuple[TokenRow, ...]], n_time: int) -> int | None:
    """The time axis of rows that hold both answers of a pair, where they are short enough to be worth it."""
    n_joint = _rounded(max(joint.joint_length(both_sides(row)) for row in rows))
    return n_joint if n_joint <= joint.WORTH * 2 * n_time else None


def both_sides(rows: tuple[TokenRow, ...]) -> joint.Pair:
    """The tokens of an example's two answers; a graded row with a single one has an empty second."""
    return rows[0].tokens, rows[1].tokens if len(rows) > 1 else rows[0].tokens[:0]


def _too_long(place: str, n_tokens: int, max_length: int) -> str:
    return (
        f"{place}: {n_tokens} tokens, more than dataset.max_length={max_length}; raise it, or set "
        "dataset.on_long=truncate or dataset.on_long=drop"
    )


def _report(examples: Examples, settings: Settings, name: str) -> None:
    flat = [row for group in examples.sequences for row in group]
    n_tokens = sum(len(row.tokens) for row in flat)
    log.info(
        "%s: %d %s rows, %d tokens (%d of them trained on), longest %d, time axis %d",
        name, len(examples), examples.form, n_tokens, sum(int(row.is_answer.sum()) for row in flat),
        max(len(row.tokens) for row in flat), examples.n_time,
    )  # fmt: skip
    if examples.n_slots and examples.vision is not None:
        log.info(
            "%s: %d images in %d rows, at most %d in a row of a batch; each is resized to %d × %d and %d tokens",
            name, sum(map(len, examples.pictures)), sum(map(bool, examples.pictures)), examples.n_slots,
            examples.vision.image_size, examples.vision.image_size, examples.vision.tokens_per_image,
        )  # fmt: skip
    if examples.n_joint is not None and any(len(rows) == 2 for rows in examples.sequences):
        log.info(
            "%s: prompts are run once for both answers: %d tokens a pair, not 2 × %d",
            name,
            examples.n_joint,
            examples.n_time,
        )
    if len(examples.packs) < len(examples):
        filled = n_tokens / (len(examples.packs) * examples.n_time)
        log.info("%s: packed into %d rows, %.0f %% filled", name, len(examples.packs), 100 * filled)
    if examples.n_dropped or examples.n_truncated:
        log.warning(
            "%s: %d rows longer than %d tokens left out, %d cut",
            name, examples.n_dropped, settings.max_length, examples.n_truncated,
        )  # fmt: skip
