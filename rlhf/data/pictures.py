"""Which pictures a row shows, and where in its messages: the forms that rows give them in, made one.

Reading and cutting them is `images.py`'s business.
"""

import base64
import binascii
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.data.examples import Example, Messages, prompt_of, with_messages
from rlhf.data.images import PanAndScan, Picture, describe, inspect
from rlhf.errors import DataError
from rlhf.model.chat import Message, Placed
from rlhf.model.vision import Vision

_KEYS = ("image", "path", "bytes", "base64", "image_url", "url")  # of a part of a message
_COLUMNS = ("image", "images")
# the words of the published Gemma 3 processor around a picture and its parts
_WHOLE, _PARTS = "Here is the original image ", " and here are some crops to help you see better "


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A picture as base64 text, decoded when it is read."""

    text: str

    def read(self) -> bytes:
        try:
            return base64.b64decode(self.text, validate=True)
        except binascii.Error as error:
            raise OSError(f"no base64 text: {error}") from None


@dataclasses.dataclass(frozen=True)
class Viewing:
    """How pictures are read.

    vision: the tower that they are for; None: there is none.
    max_images: of a row; 0: they are left out.
    pan_and_scan: how long ones are cut into parts; None: they are not.
    """

    vision: Vision | None
    max_images: int
    pan_and_scan: PanAndScan | None = None


def image_of_part(part: Mapping[str, Any]) -> Any:
    """What a part {"type": "image", ...} of a message shows; None: one of the row's own images.

    Raises:
        DataError: more than one thing is named.
    """
    named = [(key, part[key]) for key in _KEYS if part.get(key) is not None]
    if not named:
        return None
    if len(named) > 1:
        raise DataError(f"an image part names {' and '.join(key for key, _ in named)}: one of them is enough")
    key, value = named[0]
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    return Encoded(value) if key == "base64" and isinstance(value, str) else value


def images_of_row(fields: Mapping[str, Any], column: str | None) -> list[Any]:
    """The images in a column of its own: the named one, or `image` or `images`, where there is one.

    Raises:
        DataError: there is no such column, or both and none named.
    """
    if column is not None and column not in fields:
        raise DataError(f"there is no column {column!r} (there are: {', '.join(map(str, fields)) or 'none'})")
    found = [name for name in _COLUMNS if fields.get(name) is not None] if column is None else [column]
    if len(found) > 1:
        raise DataError("there are columns 'image' and 'images': name the one that counts as dataset.rows.images")
    value = fields[found[0]] if found else None
    several = list(value) if isinstance(value, list | tuple) else [value]
    return [image for image in several if image is not None]


def with_pictures(example: Example, own: Sequence[Any], viewing: Viewing, folder: Path | None, place: str) -> Example:
    """The example with a `Picture` for each of its images, and the row's own images where they belong.

    own: the row's images; they go to the places that messages leave for them, or in front of the first user turn.
    folder: what paths are relative to. place: of the row, for later messages.

    Raises:
        DataError: a picture that can't be read; more than max_images; places and images that are not as many.
    """
    prompt = prompt_of(example)
    if not own and not any(message.images for message in prompt):
        return example
    if viewing.max_images == 0:
        return with_messages(example, lambda messages: tuple(m._replace(images=()) for m in messages))
    if viewing.vision is None:
        raise DataError(
            "the row has an image and model.vision is null: choose a model that sees, or dataset.max_images=0 to read "
            "the text alone"
        )
    filled = _filled(prompt, own)
    seen = tuple(_seen(message, viewing.pan_and_scan, folder, place) for message in filled)
    n_images = sum(len(message.images) for message in seen)
    if n_images > viewing.max_images:
        raise DataError(f"the row has {n_images} images, more than dataset.max_images={viewing.max_images}")
    return with_messages(example, lambda messages: (*seen, *messages[len(seen) :]))


def pictures_of(example: Example) -> list[Picture]:
    """In order."""
    return [placed.image for message in prompt_of(example) for placed in message.images]


def _filled(messages: Messages, own: Sequence[Any]) -> Messages:
    """The row's images in the places left for them, or, without any, in front of the first user turn."""
    n_places = sum(placed.image is None for message in messages for placed in message.images)
    if n_places == 0 and any(message.images for message in messages):
        return messages  # they bring their own, which a column may repeat
    if n_places == 0:
        first = next(number for number, message in enumerate(messages) if message.role == "user")
        return tuple(
            m._replace(images=tuple(Placed(0, image) for image in own)) if number == first else m
            for number, m in enumerate(messages)
        )
    if n_places != len(own):
        raise DataError(f"the messages leave places for {n_places} images, and the row has {len(own)}")
    waiting = iter(own)
    return tuple(
        m._replace(images=tuple(p if p.image is not None else Placed(p.at, next(waiting)) for p in m.images))
        for m in messages
    )


def _seen(message: Message, pan_and_scan: PanAndScan | None, folder: Path | None, place: str) -> Message:
    """The message with pictures that were looked at, each in its parts where it is cut."""
    text, done, images = "", 0, []
    for placed in message.images:
        text, done = text + message.content[done : placed.at], placed.at
        source = _source(placed.image, folder)
        digest, (width, height) = inspect(source, describe(source))
        images.append(Placed(len(text), Picture(source, place, digest)))
        boxes = pan_and_scan.boxes(width, height) if pan_and_scan is not None else []
        if not boxes:
            continue
        images[-1] = images[-1]._replace(at=len(text) + len(_WHOLE))
        text += _WHOLE + _PARTS
        for number, box in enumerate(boxes):
            text += " " if number else ""
            images.append(Placed(len(text), Picture(source, place, digest, box)))
    return message._replace(content=text + message.content[done:], images=tuple(images))


def _source(value: Any, folder: Path | None) -> Any:
    """What `images.py` can read, of a path, a data URL, bytes, {"bytes", "path"} or a picture that Pillow has open."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        return _of_text(value, folder)
    if isinstance(value, Path):
        return value if folder is None else folder / value
    if isinstance(value, bytes | Encoded) or hasattr(value, "read") or hasattr(value, "convert"):
        return value
    raise DataError(f"an image must be a path, a data URL, bytes or {{'bytes', 'path'}}, not a {type(value).__name__}")


def _of_text(text: str, folder: Path | None) -> Any:
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        if not head.endswith(";base64"):
            raise DataError(f"the data URL {text[:40]!r} is not in base64")
        return Encoded(body)
    if text.startswith(("http://", "https://")):
        raise DataError(f"the image {text[:80]!r} is on the network: save it and give its path")
    if len(text) > 1000:
        raise DataError("an image of so long a text is no path; base64 needs 'data:image/png;base64,' in front")
    path = Path(text).expanduser()
    return path if folder is None else folder / path
