"""Pictures to arrays, with Pillow: what a file must be, how it is turned, cut and resized, and when it is read.

A dataset keeps where its pictures are (`Picture`); each is looked at once before training, for its size and for whether
it is whole, and decoded when a batch needs it. The pixels are those of the published Gemma 3 processor: RGB, the whole
picture resized to a square, bilinear with Pillow's antialiasing. Normalisation is the model's business.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import itertools
import logging
import math
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from rlhf.config import config, require_range
from rlhf.errors import DataError

log = logging.getLogger(__name__)

MOST_PIXELS = 64_000_000  # of a picture: what a camera makes, not what a few bytes of an evil file can claim
CACHE_BYTES = 256 << 20  # of decoded pictures

Box = tuple[int, int, int, int]  # left, upper, right, lower
Pixels = UInt8[np.ndarray, "size size 3"]


@runtime_checkable
class Stored(Protocol):
    """A picture's bytes, somewhere else."""

    def read(self) -> bytes: ...


Source = Path | bytes | Stored | Any  # or a picture that Pillow has open


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture, or a part of one, that is not read yet.

    place: of its row, for messages. digest: of its content. box: the part; None: the whole.
    """

    source: Source
    place: str
    digest: str
    box: Box | None = None

    @property
    def key(self) -> str:
        """Two with the same key look the same."""
        return f"{self.digest} {self.box}"


@config
class PanAndScan:
    """Parts of a long picture, shown beside the whole of it.

    min_crop_size: pixels; no part has a shorter side.
    max_crops: parts of a picture.
    min_ratio: of the longer to the shorter side, below which a picture is not cut.
    """

    min_crop_size: int = 256
    max_crops: int = 4
    min_ratio: float = 1.2

    def __post_init__(self):
        require_range(self, "min_crop_size", at_least=1)
        require_range(self, "max_crops", at_least=2)
        require_range(self, "min_ratio", at_least=1)

    def boxes(self, width: int, height: int) -> list[Box]:
        """Equal parts along the longer side, about as many as it is longer; none where they would be too small."""
        long, short = max(width, height), min(width, height)
        if long / short < self.min_ratio:
            return []
        n = min(max(min(math.floor(long / short + 0.5), long // self.min_crop_size), 2), self.max_crops)
        part = math.ceil(long / n)
        if min(part, short) < self.min_crop_size:
            return []
        ends = [(start, min(start + part, long)) for start in range(0, long, part)]
        return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in ends]


def inspect(source: Source, name: str) -> tuple[str, tuple[int, int]]:
    """Digest, and width and height as a viewer shows them.

    Raises:
        DataError: no such file, no picture, more pixels than MOST_PIXELS, floating-point ones, or a file that ends too
            early.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        turned = _upright(source, name)
        return _digest(f"{turned.mode} {turned.size}".encode() + turned.tobytes()), turned.size
    data = _read(source, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a rule of our own
        image = _open(data, name)
    with image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise DataError(f"{name} has {width} × {height} pixels, more than {MOST_PIXELS:,}: make it smaller")
        if image.mode == "F":
            raise DataError(f"{name} has floating-point pixels, whose white is not known: save it with 8 or 16 bits")
        _require_whole(data, image, name)
        is_lying = _orientation(image, name) >= 5  # as the sensor saw it, which is on its side
    return _digest(data), (height, width) if is_lying else (width, height)


def decode(picture: Picture, size: int) -> Pixels:
    """The picture as size × size pixels.

    Raises:
        DataError: it can't be read any more, or is not what it was.
    """
    from PIL import Image

    name = f"{picture.place}: {describe(picture.source)}"
    image = picture.source
    if not isinstance(image, Image.Image):
        data = _read(image, name)
        if _digest(data) != picture.digest:
            raise DataError(f"{name} is not what it was when the rows were read: start again")
        image = _open(data, name)
    try:
        upright = _rgb(_upright(image, name), name)
        part = upright if picture.box is None else upright.crop(picture.box)
        return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
    except DataError:
        raise
    except Exception as error:  # of many classes; none can be put right here
        raise DataError(f"{name} can't be decoded: {error}") from error


def load_images(
    rows: Sequence[Sequence[Picture]], n_slots: int, size: int
) -> UInt8[np.ndarray, "rows slots size size 3"]:
    """The pictures of each row, in order; slots that a row does not fill are black.

    Raises:
        DataError: one can't be read; names its row and file.
    """
    images = np.zeros((len(rows), n_slots, size, size, 3), np.uint8)
    places = [(row, slot) for row, pictures in enumerate(rows) for slot in range(len(pictures))]
    pictures = [rows[row][slot] for row, slot in places]
    for place, pixels in zip(places, _workers().map(_cache.get, pictures, itertools.repeat(size)), strict=True):
        images[place] = pixels
    return images


def describe(source: Source) -> str:
    """How a message calls it."""
    return f"image {source}" if isinstance(source, Path) else "the image"


class _Cache:
    """Decoded pictures, the last used, up to CACHE_BYTES: small sets are decoded once, large ones again each epoch."""

    def __init__(self):
        self._kept: collections.OrderedDict[tuple[str, int], Pixels] = collections.OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def get(self, picture: Picture, size: int) -> Pixels:
        key = (picture.key, size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        pixels = decode(picture, size)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = pixels
                self._n_bytes += pixels.nbytes
            while self._n_bytes > CACHE_BYTES:
                self._n_bytes -= self._kept.popitem(last=False)[1].nbytes
        return pixels


_cache = _Cache()


@functools.cache
def _workers() -> concurrent.futures.ThreadPoolExecutor:
    """Pillow lets other threads run while it decodes."""
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="images")


def _read(source: Source, name: str) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes() if isinstance(source, Path) else source.read()
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{name} can't be read: {error}") from error


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _open(data: bytes, name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError(f"{name} is an empty file")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is no picture of a kind that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF …)"
        ) from None
    except Image.DecompressionBombError:
        raise DataError(f"{name} has more than {MOST_PIXELS:,} pixels: make it smaller") from None
    except Exception as error:  # a header that is broken in one of many ways
        raise DataError(f"{name} can't be read as a picture: {error}") from error


def _require_whole(data: bytes, image: Any, name: str) -> None:
    """Refuse a file that ends too early, without decoding it where its form allows that."""
    try:
        if image.format in ("JPEG", "MPO"):
            if data.rfind(b"\xff\xd9") < 0:
                raise DataError(f"{name} is cut off: the end of a JPEG file is missing")
        elif image.format == "PNG":
            _open(data, name).verify()  # reads every chunk and its checksum, and uses the object up
        else:
            image.load()
    except DataError:
        raise
    except Exception as error:  # of many classes
        raise DataError(f"{name} is damaged or cut off: {error}") from error


def _orientation(image: Any, name: str) -> int:
    from PIL import ExifTags

    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # of many classes; the picture is there all the same
        log.warning("%s: it isn't turned, for its EXIF data can't be read: %s", name, error)
        return 1


def _upright(image: Any, name: str) -> Any:
    """Turned and mirrored as its EXIF orientation asks (CIPA DC-008-2023, section 4.6.6)."""
    from PIL import Image

    turns = Image.Transpose
    asked = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    orientation = _orientation(image, name)
    return image.transpose(asked[orientation]) if orientation in asked else image


def _rgb(image: Any, name: str) -> Any:
    """Three channels of 8 bits. Alpha is left out, as the published processor does: what lies under it shows."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{name} has pixels outside 0 … 65535: save it with 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "P":  # by way of alpha: straight to three channels, Pillow warns of transparent colours
        image = image.convert("RGBA")
    return image.convert("RGB")
