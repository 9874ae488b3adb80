"""Pictures to pixels: every kind of file as a viewer shows it, and what is refused."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rlhf.data import images as module
from rlhf.data.images import PanAndScan, Picture, decode, inspect, load_images
from rlhf.data.pictures import Encoded
from rlhf.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
RED, BLUE = (200, 10, 20), (20, 10, 200)


def stored(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def picture(source, **fields) -> Picture:
    return Picture(source, "here", inspect(source, "it")[0], **fields)


def pixels(data: bytes, size: int = 8, **fields) -> np.ndarray:
    return decode(picture(data, **fields), size)


def test_processed_pixels_equal_the_reference(shared):
    """Not one bit apart from the published processor; the official library does not round to bytes."""
    expected = np.load(shared / "fixtures" / "gemma3_tiny_mm" / "expected.npz")
    for i in range(3):
        found = pixels(stored(Image.fromarray(expected[f"raw_image_{i}"])), 56).astype(np.float32) / 127.5 - 1
        np.testing.assert_array_equal(found, expected["pixel_values"][i].transpose(1, 2, 0))
    official = np.load(shared / "fixtures" / "orbax_tiny_mm" / "expected.npz")
    for i in range(2):
        found = pixels(stored(Image.fromarray(official[f"img{i}"])), 56).astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(found, official["vision_preprocessed"][i], atol=1.01 / 127.5)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
def test_kinds_of_files(kind):
    plain = Image.new("RGB", (30, 20), RED)
    found = pixels(stored(plain, kind)).astype(int)
    assert np.abs(found - RED).max() <= (4 if kind in ("JPEG", "WEBP") else 0)


def test_palette_grey_and_cmyk():
    palette = Image.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(pixels(stored(palette)), pixels(stored(palette.convert("RGB"))))
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(pixels(stored(grey)), np.repeat(pixels(stored(grey))[..., :1], 3, axis=2))
    black_ink = Image.new("CMYK", (10, 10), (0, 0, 0, 255))
    assert pixels(stored(black_ink, "TIFF")).max() == 0
    assert pixels(stored(Image.new("1", (10, 10), 1))).min() == 255


def test_alpha_is_left_out():
    """What lies under it shows, as in the published processor."""
    clear = Image.new("RGBA", (10, 10), (*RED, 0))
    assert (pixels(stored(clear)) == RED).all()
    assert (pixels(stored(Image.new("LA", (10, 10), (90, 0)))) == 90).all()
    palette = Image.new("RGB", (10, 10), RED).quantize(2)
    assert (pixels(stored(palette, transparency=bytes(range(2)))) == RED).all()


def test_16_bits_are_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)
    found = pixels(stored(Image.fromarray(values)), 10)
    np.testing.assert_array_equal(found[..., 0], np.round(values / 257).astype(np.uint8))


def test_exif_orientation_is_followed():
    """Every orientation of one scene gives the scene."""
    scene = Image.new("RGB", (40, 24), RED)
    scene.paste(BLUE, (0, 0, 20, 12))  # blue at the top left
    expected = pixels(stored(scene), 16).astype(int)
    turns = Image.Transpose
    seen_by_sensor = {
        1: scene,
        2: scene.transpose(turns.FLIP_LEFT_RIGHT),
        3: scene.transpose(turns.ROTATE_180),
        4: scene.transpose(turns.FLIP_TOP_BOTTOM),
        5: scene.transpose(turns.TRANSPOSE),
        6: scene.transpose(turns.ROTATE_90),
        7: scene.transpose(turns.TRANSVERSE),
        8: scene.transpose(turns.ROTATE_270),
    }
    for orientation, image in seen_by_sensor.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = stored(image, exif=exif)
        assert inspect(data, "it")[1] == (40, 24), orientation
        assert np.abs(pixels(data, 16) - expected).max() == 0, orientation


def png_header(width: int, height: int) -> bytes:
    """A PNG of the given size without its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


WHOLE = {kind: stored(Image.fromarray(PIXELS), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")}
CUT = {
    "PNG": "it is damaged or cut off",
    "JPEG": "it is cut off: the end of a JPEG file is missing",
    "WEBP": "it can't be read as a picture",
    "BMP": "it is damaged or cut off",
}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is an empty file"),
        (b"hello, world", "it is no picture of a kind that can be read"),
        *((whole[: len(whole) * 2 // 3], CUT[kind]) for kind, whole in WHOLE.items()),
        (WHOLE["PNG"][:60] + b"\x00\x01\x02" + WHOLE["PNG"][63:], "it is damaged or cut off"),
        (png_header(9_000, 9_000), r"it has 9000 × 9000 pixels, more than 64,000,000: make it smaller"),
        (png_header(60_000, 60_000), r"it has more than 64,000,000 pixels"),
        (stored(Image.new("F", (4, 4), 0.5), "TIFF"), "it has floating-point pixels, whose white is not known"),
    ],
    ids=["empty", "text", *WHOLE, "flipped bytes", "large", "bomb", "float"],
)
def test_what_is_refused(data, reason):
    with pytest.raises(DataError, match=reason):
        inspect(data, "it")


def test_a_file_that_is_gone_or_changed_is_named_with_its_row(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(DataError, match=r"image .*a.png: there is no such file"):
        inspect(path, module.describe(path))
    lost = Picture(path, "rows.jsonl:3", "some digest")
    with pytest.raises(DataError, match=r"rows.jsonl:3: image .*a.png: there is no such file"):
        load_images([[lost]], 1, 8)
    path.write_bytes(WHOLE["BMP"])
    with pytest.raises(DataError, match=r"rows.jsonl:3: image .*a.png is not what it was when the rows were read"):
        load_images([[lost]], 1, 8)
    damaged = WHOLE["JPEG"][:200] + WHOLE["JPEG"][-100:]  # both ends are there
    with pytest.raises(DataError, match=r"rows.jsonl:4: the image can't be decoded: "):
        load_images([[Picture(damaged, "rows.jsonl:4", inspect(damaged, "it")[0])]], 1, 8)
    with pytest.raises(DataError, match=r"the image can't be read: no base64 text"):
        inspect(Encoded("no!"), "the image")


def test_rows_fill_their_slots_in_order_and_the_rest_is_black():
    pictures = [picture(stored(Image.new("RGB", (4, 4), colour))) for colour in (RED, BLUE)]
    found = load_images([pictures, [], pictures[1:]], 2, 4)
    assert found.shape == (3, 2, 4, 4, 3)
    assert [[tuple(slot[0, 0]) for slot in row] for row in found] == [[RED, BLUE], [(0, 0, 0)] * 2, [BLUE, (0, 0, 0)]]


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch):
    cache = module._Cache()
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * 8 * 8 * 3)
    pictures = [picture(stored(Image.new("RGB", (4, 4), (i, 0, 0)))) for i in range(9)]
    for _ in range(2):
        assert [int(cache.get(each, 8)[0, 0, 0]) for each in pictures] == list(range(9))
    assert len(cache._kept) == 3


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((1000, 1000), []),
        ((1190, 1000), []),  # below the ratio
        ((1200, 1000), [(0, 0, 600, 1000), (600, 0, 1200, 1000)]),
        ((3000, 1000), [(0, 0, 1000, 1000), (1000, 0, 2000, 1000), (2000, 0, 3000, 1000)]),
        ((300, 1500), [(0, 0, 300, 375), (0, 375, 300, 750), (0, 750, 300, 1125), (0, 1125, 300, 1500)]),
        ((500, 300), []),  # the parts would be 250 wide
        ((3000, 200), []),  # as high as the picture, which is too little
    ],
)
def test_pan_and_scan_by_hand(size, boxes):
    assert PanAndScan().boxes(*size) == boxes


def test_pan_and_scan_settings():
    assert len(PanAndScan(max_crops=2).boxes(3000, 1000)) == 2
    with pytest.raises(ConfigError, match="max_crops=1 of PanAndScan must be at least 2"):
        PanAndScan(max_crops=1)


def test_a_part_of_a_picture():
    scene = Image.new("RGB", (40, 20), RED)
    scene.paste(BLUE, (20, 0, 40, 20))
    data = stored(scene)
    assert (pixels(data, box=(20, 0, 40, 20)) == BLUE).all()
    assert (pixels(data, box=(0, 0, 20, 20)) == RED).all()
    encoded = Encoded(base64.b64encode(data).decode())
    assert (decode(picture(encoded, box=(0, 0, 20, 20)), 8) == RED).all()
