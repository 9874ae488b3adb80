"""`Dataset`: what a yaml of the dataset group describes, from where the rows lie to how they are encoded.

`Table` reads files or a set on the hub. A dataset of one's own is a subclass with two methods: `row_format` and
`raw_rows`. Batches are `batches.py`'s business.
"""

import collections
import contextlib
import gc
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

from rlhf.config import config, require_range
from rlhf.data.encode import Examples, Source, encode
from rlhf.data.examples import Example, Form, check, check_conversion, convert, prompt_of, with_system
from rlhf.data.images import PanAndScan
from rlhf.data.pictures import Viewing, images_of_row, pictures_of, with_pictures
from rlhf.data.rows import RowFormat
from rlhf.data.sources import RawRow, find_files, has_split, hub_splits, is_folder, read_files, read_hub
from rlhf.errors import ConfigError, DataError
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision

log = logging.getLogger(__name__)

Part = Literal["train", "eval"]


class Data:
    """Rows for training and for evaluation: what a run needs of them."""

    @abstractmethod
    def has_eval(self) -> bool:
        """Whether `load("eval", ...)` has rows to give, as far as can be told without reading any."""

    @abstractmethod
    def check(self, form: Form) -> None:
        """Whether the rows can serve an algorithm that asks for `form`; reads nothing.

        Raises:
            ConfigError: they can't.
        """

    @abstractmethod
    def load(self, part: Part, form: Form, tokenizer: Tokenizer, vision: Vision | None = None) -> Examples:
        """The rows of a split, encoded.

        part: "train" or "eval".
        form: what the algorithm asks for.
        vision: the tower that sees their images; None: there is none.

        Raises:
            DataError: a row, a file or a set that can't be used; names it and the reason.
            ConfigError: rows of this dataset can't be turned into `form`.
        """


@config
class Dataset(Data):
    """Settings that every dataset of one source has.

    max_length: tokens of the longest row that is used (of the longest prompt, where there are only prompts).
    on_long: what happens to a longer one: an error, it is left out, or it is cut: the prompt loses its oldest turns and
        then its oldest tokens, the answer its end, without an end-of-turn token that was not there.
    loss_on: which tokens of a conversation are trained on: every answer, the last one, or all tokens.
    packing: whether several conversations share a row of max_length tokens (without seeing each other).
    share_prompt: whether what both answers of a pair begin with is run once, where that saves three tenths.
    on_bad_row: whether a row that can't be used is an error or is left out and counted.
    limit: use at most so many training rows, the first ones; null: all.
    eval_limit: the same for evaluation.
    train_split, eval_split: their names at the source.
    system_prompt: system message of the rows that have none; null: none.
    max_images: most images of a row, parts of pan_and_scan among them; 0: they are left out.
    pan_and_scan: how long images are also shown in parts; null: they are not.
    """

    max_length: int
    on_long: Literal["error", "drop", "truncate"] = "error"
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    packing: bool = False
    share_prompt: bool = True
    on_bad_row: Literal["error", "skip"] = "error"
    limit: int | None = None
    eval_limit: int | None = None
    train_split: str = "train"
    eval_split: str = "test"
    system_prompt: str | None = None
    max_images: int = 8
    pan_and_scan: PanAndScan | None = None

    def __post_init__(self):
        require_range(self, "max_length", at_least=16)
        require_range(self, "max_images", at_least=0)
        require_range(self, "limit", at_least=1)
        require_range(self, "eval_limit", at_least=1)

    def row_format(self, form: Form) -> RowFormat:
        """How the rows are to be read when examples of `form` are wanted."""
        raise NotImplementedError

    def raw_rows(self, part: Part, form: Form) -> Iterator[RawRow]:
        """The rows of the training or the evaluation split.

        Raises:
            DataError: they are not there.
        """
        raise NotImplementedError

    def has_eval(self) -> bool:
        return True

    def held_out(self) -> float:
        """Share of the training split that is its evaluation split, for want of another."""
        return 0.0

    def check(self, form: Form) -> None:
        check_conversion(self.row_format(form).form, form)

    def examples(self, part: Part, form: Form, vision: Vision | None = None) -> list[tuple[Source, Example]]:
        """The usable examples of a split with their sources, in order; the log counts the rows that can't be used.

        vision: the tower that sees their images; None: there is none.

        Raises:
            DataError: a bad row, with place and reason (unless on_bad_row is skip), or no row at all.
            ConfigError: rows of this dataset can't be turned into `form`.
        """
        read = self.row_format(form)
        how = check_conversion(read.form, form)
        if how:
            log.info("%s: %s rows as %s: %s", part, read.form, form, how)
        limit = self.limit if part == "train" else self.eval_limit
        held_out = self.held_out()
        share = (held_out, 1.0) if part == "train" else (0.0, held_out or 1.0)
        bad = _BadRows()
        found: list[tuple[Source, Example]] = []
        n_rows, keeps_fields = 0, part == "eval" or form == "prompt"  # else a million texts would stay in memory
        for raw in self.raw_rows(part, form):
            n_rows += 1
            try:
                examples = self._examples_of(raw, read, form, vision)
            except DataError as error:
                bad.add(raw, error, self.on_bad_row)
                continue
            if _belongs(examples[0], share):
                source = Source(raw.place, (raw.fields or {}) if keeps_fields else {})
                found += [(source, example) for example in examples]
            if limit is not None and len(found) >= limit:
                break
        bad.report(part, n_rows)
        if not found:
            held = f"; dataset.holdout={held_out}" if held_out else ""
            raise DataError(f"there are no rows for {part}: {n_rows} read, {bad.n_rows} of them bad{held}{bad.example}")
        return found[:limit]

    def load(self, part: Part, form: Form, tokenizer: Tokenizer, vision: Vision | None = None) -> Examples:
        with _without_garbage_collection():
            return encode(self.examples(part, form, vision), form, tokenizer, self, part, vision)

    def _examples_of(self, raw: RawRow, read: RowFormat, form: Form, vision: Vision | None) -> list[Example]:
        if raw.fields is None:
            raise DataError(raw.problem)
        viewing = Viewing(vision, self.max_images, self.pan_and_scan)
        example = with_pictures(
            read(raw.fields), images_of_row(raw.fields, read.images), viewing, raw.folder, raw.place
        )
        check(example)
        if self.system_prompt is not None:
            example = with_system(example, self.system_prompt)
        return list(convert(example, read.form, form))


@config
class Table(Dataset):
    """Rows from local files, or else from the Hugging Face hub.

    rows: the shape of the rows, and which column holds what.
    path: a file, a pattern, a folder with files named after the splits, or a list of files; goes before `hub`.
    eval_path: the same for evaluation, where `path` is no folder.
    hub: name of a set on the hub.
    hub_subset: its subset, where it has several.
    hub_revision: branch, tag or commit; null: the newest.
    holdout: share of the training rows kept for evaluation where there is no evaluation split, chosen by the prompt.
    """

    rows: RowFormat
    path: str | tuple[str, ...] | None = None
    eval_path: str | tuple[str, ...] | None = None
    hub: str | None = None
    hub_subset: str | None = None
    hub_revision: str | None = None
    holdout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "holdout", at_least=0, at_most=0.9)
        if self.path is None and self.hub is None:
            raise ConfigError("the dataset has no rows: set dataset.path (files) or dataset.hub (a set on the hub)")
        for key in ("hub_subset", "hub_revision"):
            if getattr(self, key) is not None and self.hub is None:
                raise ConfigError(f"dataset.{key}={getattr(self, key)!r} needs dataset.hub")

    def row_format(self, form: Form) -> RowFormat:
        return self.rows

    def has_eval(self) -> bool:
        return self.eval_path is not None or self.path is None or self.holdout > 0 or self._folder_has_eval()

    def held_out(self) -> float:
        if not self.holdout or self.eval_path is not None:
            return 0.0
        if self.path is not None:
            has_split = self._folder_has_eval()
        else:
            assert self.hub is not None  # the constructor saw to it
            has_split = self.eval_split in hub_splits(self.hub, self.hub_subset, self.hub_revision)
        return 0.0 if has_split else self.holdout

    def raw_rows(self, part: Part, form: Form) -> Iterator[RawRow]:
        is_eval = part == "eval" and not self.held_out()
        split = self.eval_split if is_eval else self.train_split
        if is_eval and self.eval_path is not None:
            return read_files(find_files(self.eval_path, split, "dataset.eval_path"))
        if self.path is None:
            assert self.hub is not None  # the constructor saw to it
            return read_hub(self.hub, self.hub_subset, self.hub_revision, split)
        if is_eval and not is_folder(self.path):
            raise DataError(
                f"there are no evaluation rows: dataset.path={self.path} is no folder with a split {split!r}; set "
                "dataset.eval_path, or dataset.holdout to keep a share of the training rows"
            )
        return read_files(find_files(self.path, split))

    def _folder_has_eval(self) -> bool:
        return isinstance(self.path, str) and is_folder(self.path) and has_split(self.path, self.eval_split)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """The collector would walk all rows made so far, again and again: 40 % of the time, and nothing to be found."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _belongs(example: Example, share: tuple[float, float]) -> bool:
    """Whether the hash of the first question, with its images, is in range: rows of one question stay together."""
    if share == (0.0, 1.0):
        return True
    question = next(turn.content for turn in prompt_of(example) if turn.role == "user").strip()
    shown = "".join(picture.key for picture in pictures_of(example))
    place = int.from_bytes(hashlib.sha256(f"{question}{shown}".encode()).digest()[:4], "big") / 2**32
    return share[0] <= place < share[1]


class _BadRows:
    """Counts the rows that can't be used, by reason."""

    def __init__(self):
        self.reasons: collections.Counter[str] = collections.Counter()
        self.places: dict[str, str] = {}

    @property
    def n_rows(self) -> int:
        return self.reasons.total()

    @property
    def example(self) -> str:
        """The first of the most frequent reason, for a message."""
        if not self.reasons:
            return ""
        reason, count = self.reasons.most_common(1)[0]
        return f"; {count} × {reason} (first: {self.places[reason]})"

    def add(self, raw: RawRow, error: DataError, on_bad_row: str) -> None:
        if on_bad_row == "error":
            raise DataError(f"{raw.place}: {error} (dataset.on_bad_row=skip leaves such rows out)") from None
        self.reasons[str(error)] += 1
        self.places.setdefault(str(error), raw.place)

    def report(self, part: str, n_rows: int) -> None:
        if not self.reasons:
            return
        log.warning("%s: %d of %d rows can't be used and are left out:", part, self.n_rows, n_rows)
        for reason, count in self.reasons.most_common(10):
            log.warning("  %d × %s (first: %s)", count, reason, self.places[reason])
        if len(self.reasons) > 10:
            log.warning("  and %d other reasons", len(self.reasons) - 10)
