"""Every kind of image decodes as in an image viewer or is rejected in one line."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from convllava.errors import InputError
from convllava.model.images import load_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG with a size but without pixels: it can be rejected for its size, but not decoded."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.fixture
def picture() -> Image.Image:
    """Return 3 rows of 5 random colours."""
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    assert image.mode == "RGB"
    return np.asarray(image)


class OneWay(io.BytesIO):
    """A stream that cannot seek."""

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation


def test_all_sources_give_the_same_image(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    stream = io.BytesIO(path.read_bytes())
    for source in (
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        stream,
        OneWay(path.read_bytes()),
        picture,
        np.array(picture),
    ):
        assert np.array_equal(pixels(load_image(source)), np.asarray(picture))
    assert not stream.closed


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(picture: Image.Image, orientation: int, kind: str) -> None:
    """The file is turned so that applying the orientation restores the picture."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = picture if undo is None else picture.transpose(undo)
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(encode(lying, kind, exif=exif, **options))
    assert np.array_equal(pixels(loaded), np.asarray(picture))
    assert np.array_equal(pixels(load_image(loaded)), np.asarray(picture))


def test_broken_exif_block_is_ignored(picture: Image.Image) -> None:
    data = encode(picture, exif=b"Exif\x00\x00garbage of no meaning")
    assert np.array_equal(pixels(load_image(data)), np.asarray(picture))


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return image


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("LA", (1, 1), (0, 51)), (204, 204, 204)),
        (Image.new("La", (1, 1), (0, 51)), (204, 204, 204)),
        (Image.new("RGBa", (1, 1), (51, 0, 0, 51)), (255, 204, 204)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)).convert("PA"), WHITE),
        (np.array([[[255, 0, 0, 51]]], np.uint8), (255, 204, 204)),
        (np.array([[[1.0, 0, 0, 0.2]]], np.float32), (255, 204, 204)),
        (encode(palette_with_transparency(), transparency=0), WHITE),
        (encode(palette_with_transparency(), transparency=1), RED),
        (encode(palette_with_transparency(), transparency=bytes([51, 255])), (255, 204, 204)),
        (encode(palette_with_transparency(), "GIF", transparency=0), WHITE),
        (encode(Image.new("RGB", (1, 1), RED), transparency=RED), WHITE),
        (encode(Image.new("L", (1, 1), 7), transparency=7), WHITE),
    ],
)
def test_transparency_becomes_white(source: Any, expected: tuple[int, int, int]) -> None:
    assert load_image(source).getpixel((0, 0)) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Image.new("1", (1, 1), 1), WHITE),
        (Image.new("L", (1, 1), 99), (99, 99, 99)),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), RED),
        (Image.new("HSV", (1, 1), (0, 255, 255)), RED),
        (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), RED),
        (encode(Image.new("RGB", (1, 1), RED), "GIF"), RED),
        (encode(Image.new("RGB", (1, 1), RED), "BMP"), RED),
    ],
)
def test_other_colour_spaces(source: Any, expected: tuple[int, int, int]) -> None:
    assert load_image(source).getpixel((0, 0)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 257, 32896, 65535]], ">u2"), [0, 1, 128, 255]),
        (np.array([[False, True]]), [0, 255]),
        (np.array([[0, 0.5, 1]], np.float16), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float64), [0, 128, 255]),
        (np.array([[[3], [200]]], np.uint8), [3, 200]),
        (np.array([[3, 9, 200]], np.uint8)[:, ::2], [3, 200]),
        (Image.fromarray(np.array([[0, 257, 65535]], np.uint16)), [0, 1, 255]),
        (Image.fromarray(np.array([[0, 257, 65535]], np.int32)), [0, 1, 255]),
        (Image.fromarray(np.array([[0, 9, 255]], np.int32)), [0, 9, 255]),
        (Image.fromarray(np.array([[-100, 0, 300]], np.int32)), [0, 64, 255]),
        (Image.fromarray(np.array([[70000, 70000]], np.int32)), [0, 0]),
        (Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), [0, 128, 255]),
        (Image.fromarray(np.array([[0, 9, 255]], np.float32)), [0, 9, 255]),
        (Image.fromarray(np.array([[-1, 0, 1]], np.float32)), [0, 128, 255]),
    ],
)
def test_deep_grey_values_are_scaled_and_not_clipped(values: Any, expected: list[int]) -> None:
    for source in (values, encode(values, "TIFF")) if isinstance(values, Image.Image) else (values,):
        assert pixels(load_image(source))[0, :, 0].tolist() == expected


def test_sixteen_bit_png_is_scaled() -> None:
    data = encode(Image.fromarray(np.array([[0, 257, 65535]], np.uint16)))
    assert pixels(load_image(data))[0, :, 1].tolist() == [0, 1, 255]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert load_image(data).getpixel((0, 0)) == RED


def test_the_result_is_a_copy(picture: Image.Image) -> None:
    before = np.array(picture)
    load_image(picture).paste((0, 0, 0), (0, 0, 5, 3))
    assert np.array_equal(np.asarray(picture), before)


@given(
    st.binary(max_size=200),
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM"]),
    st.data(),
)
def test_damaged_bytes_decode_or_are_rejected_in_one_line(noise: bytes, kind: str, data: st.DataObject) -> None:
    whole = encode(Image.new("RGB", (16, 16), RED), kind)
    start = data.draw(st.integers(0, len(whole)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = ""
        try:
            pixels(load_image(whole[:start] + noise + whole[start + len(noise) :]))
        except InputError as error:
            refusal = str(error)
    assert "\n" not in refusal


def test_truncated_file_is_rejected(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "cut.jpg"
    path.write_bytes(encode(Image.fromarray(noise), "JPEG")[:1000])
    with pytest.raises(InputError, match=r"cut\.jpg: damaged, cut short .*; save it again"):
        load_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/a.png", "^/nowhere/a.png: no such file"),
        ("/", "^/: a directory"),
        ("a\0b", "cannot be read .*null"),
        ("x" * 5000, "cannot be read .*too long"),
        ("https://example.com/a.png", "download it first"),
        ("HTTP://example.com/a.png", "download it first"),
        (b"", "^bytes: empty, or not an image"),
        (b"just text", "^bytes: empty, or not an image"),
        (io.StringIO("text"), "^StringIO: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", "PostScript"),
        (None, "^NoneType: not an image; give a path"),
        (7, "^int: not an image"),
        ([np.zeros((2, 2))], "^list: not an image"),
        (Image.new("RGB", (0, 5)), "^Pillow image: .*0x5.* empty"),
        (Image.new("RGB", (30000, 1)), "30000x1 .* 200:1"),
        (np.zeros((0, 5, 3), np.uint8), "^numpy array: .*5x0.* empty"),
        (np.zeros((1, 201), np.uint8), "201x1 .* 200:1"),
        (np.zeros(9, np.uint8), r"shape is \(9,\)"),
        (np.zeros((4, 4, 2), np.uint8), r"shape is \(4, 4, 2\)"),
        (np.zeros((3, 8, 8), np.uint8), r"shape is \(3, 8, 8\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"shape is \(1, 4, 4, 3\)"),
        (np.zeros((4, 4), np.int64), "dtype is int64"),
        (np.zeros((4, 4), object), "dtype is object"),
        (np.full((4, 4), 255.0), "run from 255 to 255; scale them to 0..1"),
        (np.full((4, 4), -0.5), "run from -0.5 to -0.5"),
        (np.full((4, 4), np.nan), "run from nan to nan"),
        (Image.fromarray(np.array([[0, np.inf]], np.float32)), "not finite"),
    ],
)
def test_bad_sources_are_rejected_in_one_line(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        load_image(source)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("side", [10_001, 14_000, 60_000])
def test_too_many_pixels_are_rejected_before_decoding(side: int) -> None:
    """Also beyond Pillow's own limits of 89 (a warning) and 179 megapixels (an error)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(InputError, match=f"has {side**2 / 1e6:.1f} megapixels; the limit is 100; resize"):
            load_image(png_header(side, side))


def ico(picture: bytes) -> bytes:
    return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def icns(picture: bytes) -> bytes:
    return struct.pack(">4sI4sI", b"icns", len(picture) + 16, b"icp4", len(picture) + 8) + picture


def iptc(picture: bytes) -> bytes:
    fields = (((3, 60), b"\x01\0"), ((3, 20), b"\x10"), ((3, 30), b"\x10"), ((3, 120), b"\x05"), ((8, 10), picture))
    return b"".join(struct.pack(">3BH", 0x1C, *tag, len(value)) + value for tag, value in fields) + bytes(5)


def blp(picture: bytes) -> bytes:
    sizes = (len(picture), *[0] * 15)
    return struct.pack("<4s6I32II", b"BLP1", 0, 0, 16, 16, 0, 0, 160, *[0] * 15, *sizes, 0) + picture


@pytest.mark.parametrize("wrap", [ico, icns, iptc, blp])
def test_containers_are_rejected_before_decoding(
    wrap: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = wrap(encode(Image.new("RGB", (100, 100)), "JPEG" if wrap is blp else "PNG"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Image.open(io.BytesIO(data)).format == wrap.__name__.upper()
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(
        InputError, match=f"{wrap.__name__.upper()}, whose header may state a wrong size .*; convert it to PNG"
    ):
        load_image(data)


@pytest.mark.parametrize("make", [lambda image: image, encode, np.asarray], ids=["pillow", "bytes", "array"])
def test_the_limit_can_be_set(make: Callable[[Image.Image], Any]) -> None:
    source = make(Image.new("RGB", (30, 20), RED))
    assert load_image(source, max_image_pixels=600).size == (30, 20)
    with pytest.raises(InputError, match=r"0\.0 megapixels; the limit is 0\.000599"):
        load_image(source, max_image_pixels=599)


def test_limit_above_pillows_works_and_does_not_change_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert load_image(encode(Image.new("RGB", (30, 20), RED))).size == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 10
