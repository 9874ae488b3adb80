"""Gemma 3's SentencePiece tokenizer: text to token ids and back.

Special ids are looked up by name in the model file, so the shipped small tokenizer and Gemma's own work alike. Content
is text: a control piece spelt out inside it (`<end_of_turn>`, `<unused7>` ...) is encoded as ordinary characters. What
a conversation looks like in tokens is `chat.py`'s business.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError, DataError

EMBEDDED = Path(__file__).resolve().parent / "embedded" / "tokenizer.model"

_SPECIAL = ("pad", "eos", "bos", "unk", "mask", "start_of_turn", "end_of_turn", "start_of_image", "end_of_image")
_OTHER_CONTROL = ("[multimodal]", "[@BOS@]", "[toxicity=0]", "<image_soft_token>")


class Tokenizer:
    """A SentencePiece model with Gemma's special pieces.

    path: `tokenizer.model`, or a folder that holds it; None is the small tokenizer inside the package.
    pad, eos, bos, unk, mask, start_of_turn, end_of_turn, start_of_image, end_of_image: the special ids.

    As in SentencePiece everywhere, the character U+2581 means a space: it decodes to one.

    Raises:
        CheckpointError: no such file, no SentencePiece model, or a model that lacks one of the special pieces.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = _locate(path)
        self._model = _read(self.path)
        ids = {name: self._model.piece_to_id(f"<{name}>") for name in _SPECIAL}
        unknown = self._model.unk_id()
        missing = [f"<{name}>" for name, index in ids.items() if index == unknown and name != "unk"]
        if missing:
            raise CheckpointError(f"{self.path} is no Gemma tokenizer: it has no piece {', '.join(missing)}")
        self.pad: int = ids["pad"]
        self.eos: int = ids["eos"]
        self.bos: int = ids["bos"]
        self.unk: int = ids["unk"]
        self.mask: int = ids["mask"]
        self.start_of_turn: int = ids["start_of_turn"]
        self.end_of_turn: int = ids["end_of_turn"]
        self.start_of_image: int = ids["start_of_image"]
        self.end_of_image: int = ids["end_of_image"]
        self.n_vocab: int = self._model.get_piece_size()
        self._control = frozenset(ids.values()) | self._unused() | self._named(_OTHER_CONTROL)
        self._spelt = self._spelt_control()

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The ids at which generation ends."""
        return self.eos, self.end_of_turn

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS; never a control id.

        Raises:
            DataError: `text` holds a lone surrogate, which is no character.
        """
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in one call of the library.

        Raises:
            DataError: one of them holds a lone surrogate.
        """
        pieces: list[str] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            refuse_lone_surrogates(text)
            for piece in self._cut(text):
                pieces.append(piece)
                owners.append(owner)
        encoded: list[list[int]] = [[] for _ in texts]
        for owner, ids in zip(owners, self._model.encode(pieces) if pieces else [], strict=True):
            encoded[owner].extend(ids)
        return encoded

    def decode(self, ids: Iterable[int], *, show_control: bool = False) -> str:
        """Text of `ids`; control pieces are left out, or spelt out with `show_control`."""
        text: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            if self.is_control(index):
                text.append(self._model.decode(run) if run else "")
                text.append(self.piece(index) if show_control else "")
                run = []
            else:
                run.append(index)
        return "".join((*text, self._model.decode(run) if run else ""))

    def piece(self, index: int) -> str:
        """How the vocabulary spells `index`; an id past its end is shown as a number."""
        return self._model.id_to_piece(int(index)) if 0 <= index < self.n_vocab else f"<id {int(index)}>"

    def is_control(self, index: int) -> bool:
        """Whether `index` steers the model and stands for no characters."""
        return index in self._control or not 0 <= index < self.n_vocab

    def _unused(self) -> frozenset[int]:
        found = set()
        for number in range(self.n_vocab):
            index = self._model.piece_to_id(f"<unused{number}>")
            if index == self._model.unk_id():
                break
            found.add(index)
        return frozenset(found)

    def _named(self, names: Iterable[str]) -> frozenset[int]:
        return frozenset(map(self._model.piece_to_id, names)) - {self._model.unk_id()}

    def _spelt_control(self) -> re.Pattern[str]:
        """Matches (of no width) where the library would read a control piece in text: the user-defined ones."""
        names = [f"<{name}>" for name in _SPECIAL] + list(_OTHER_CONTROL)
        read = [name for name in names if self._control.intersection(self._model.encode(name))]
        return re.compile("(?=" + "|".join([r"<unused\d+>", *map(re.escape, read)]) + ")")

    def _cut(self, text: str) -> list[str]:
        """`text` in parts that, encoded one by one, hold no control piece: cut behind the first character of each."""
        if "<" not in text and "[" not in text:
            return [text]
        ends = [match.start() + 1 for match in self._spelt.finditer(text)]
        return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def refuse_lone_surrogates(text: str) -> None:
    """Raises DataError if `text` can't be written as UTF-8."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DataError(f"character {error.start + 1} of the text is {code}, half of a surrogate pair") from None


def _locate(path: str | Path | None) -> Path:
    if path is None:
        return EMBEDDED
    place = Path(path).expanduser()
    if place.is_dir():
        place = place / "tokenizer.model"
    if not place.is_file():
        raise CheckpointError(f"no tokenizer at {place}: expected a SentencePiece file named tokenizer.model")
    return place


@functools.cache
def _read(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is no SentencePiece model: {error}") from error
