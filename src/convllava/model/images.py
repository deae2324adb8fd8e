"""Decoding: whatever a user may call an image -> an upright RGB Pillow image, or one line that says why not.

Nothing is fetched from the network, and pixels are counted before any is decoded.
"""

from __future__ import annotations

import threading
import warnings
from io import BytesIO, UnsupportedOperation
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from convllava.errors import InputError
from convllava.geometry import Size, check_size

MAX_IMAGE_PIXELS = 100_000_000
ImageSource = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[Any]

_LIMIT_LOCK = threading.Lock()
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_WRAPPERS = ("BLP", "ICNS", "IPTC")
"""Kinds that hold a picture of another kind, about whose size their own header may lie."""
_ICO = b"\0\0\1\0"
"""How another such kind begins."""


def load_image(source: ImageSource, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode one image to 8-bit RGB, upright by its EXIF orientation, transparency laid on white.

    Args:
        source: A path, encoded bytes, a binary stream, a Pillow image, or an array of shape (H, W) or
            (H, W, 1 or 3 or 4) of uint8, uint16, bool, or floats from 0 to 1. Of an animation, the first
            frame is taken (of a Pillow image, its current frame).
        max_image_pixels: Most pixels to decode.

    Returns:
        A new image of mode RGB, without metadata: loading it again changes nothing.

    Raises:
        InputError: the source is missing, of a wrong kind, no image or a damaged one, or has no pixels, too
            many, or an aspect ratio beyond `geometry.MAX_ASPECT_RATIO`. The message begins with the name of
            the source.
    """
    try:
        return _load(source, max_image_pixels)
    except InputError as error:
        raise InputError(f"{_name(source)}: {error}") from error.__cause__


def _load(source: ImageSource, max_image_pixels: int) -> Image.Image:
    if isinstance(source, np.ndarray):
        _check_array(source)
        _check_pixels(Size(*source.shape[:2]), max_image_pixels)
        return _to_rgb(_from_array(source))
    if isinstance(source, Image.Image):
        return _decode(source, max_image_pixels)
    if isinstance(source, str | Path):
        with _open_file(source) as file, _open_image(file) as image:
            return _decode(image, max_image_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(_open_image(BytesIO(source)), max_image_pixels)
    if hasattr(source, "read"):
        return _decode(_open_image(source), max_image_pixels)
    raise InputError("not an image; give a path, bytes, a binary stream, a Pillow image or a numpy array")


def check_header(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> str:
    """Look at the header of encoded bytes alone, in no time whatever they may hold.

    Returns:
        The format, as Pillow calls it.

    Raises:
        InputError: as `load_image` would raise for what a header tells.
    """
    with _open_image(BytesIO(data)) as image:
        _check_pixels(Size(image.height, image.width), max_image_pixels)
        return image.format or ""


def is_loaded(source: object) -> bool:
    """Whether `load_image` would only copy this: a plain RGB image with nothing to turn or to lay on white."""
    return type(source) is Image.Image and source.mode == "RGB" and not source.info


def _name(source: object) -> str:
    """What to call the source in a message."""
    if isinstance(source, Image.Image):
        return _one_line(getattr(source, "filename", "") or "Pillow image")
    if isinstance(source, np.ndarray):
        return "numpy array"
    if isinstance(source, str | Path):
        return _one_line(source)
    return _one_line(getattr(source, "name", type(source).__name__))


def _one_line(value: object) -> str:
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-70:]}"


def _open_file(path: str | Path) -> BinaryIO:
    if str(path).lower().startswith(("http://", "https://")):
        raise InputError("nothing is fetched from the network; download it first and give the file's path")
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise InputError("no such file; check the path") from None
    except IsADirectoryError:
        raise InputError("a directory; give the path of an image file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot be read ({reason}); check the path") from error


def _open_image(file: BinaryIO) -> Image.Image:
    """Read the header alone."""
    try:
        file = _at_its_start(file)
        if file.read(len(_ICO)) == _ICO:  # Pillow decodes these to learn their size
            raise _wrapper("ICO")
        try:
            with warnings.catch_warnings():
                # Pillow warns from 89 megapixels on; our own limit speaks for itself.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(file)
        except Image.DecompressionBombError:
            return _open_beyond_pillows_limit(file)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError("empty, or not an image file of a known kind; convert it to PNG or JPEG") from error
    # Plugins meet hostile bytes and raise nearly anything: OSError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        raise _damaged(error) from error


def _at_its_start(file: BinaryIO) -> BinaryIO:
    """The same stream, or all of one that cannot go back."""
    try:
        file.seek(0)
    except (AttributeError, UnsupportedOperation):
        return BytesIO(file.read())
    return file


def _open_beyond_pillows_limit(file: BinaryIO) -> Image.Image:
    """Our own limit is checked next, and may be higher than Pillow's, a variable of the whole process."""
    with _LIMIT_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _damaged(error: Exception) -> InputError:
    reason = _one_line(" ".join(str(error).split()) or type(error).__name__)
    return InputError(f"damaged, cut short or of an unsupported kind ({reason}); save it anew as PNG or JPEG")


def _wrapper(kind: str) -> InputError:
    return InputError(f"{kind}, whose header may lie about the picture inside; convert it to PNG")


def _decode(image: Image.Image, max_image_pixels: int) -> Image.Image:
    size = Size(image.height, image.width)
    _check_pixels(size, max_image_pixels)
    if image.format == "EPS":
        raise InputError("PostScript, which is a program and not an image; convert it to PNG")
    if image.format in _WRAPPERS:
        raise _wrapper(image.format)
    try:
        image.load()
        # Of what was decoded, whatever the header said.
        _check_pixels(Size(image.height, image.width), max_image_pixels)
        upright = _turned(_to_rgb(image), _orientation(image))
        # The metadata would have the next reader turn it again.
        upright.info = {}
        return upright
    except InputError:
        raise
    # As in `_open_image`.
    except Exception as error:
        raise _damaged(error) from error


def _check_pixels(size: Size, max_image_pixels: int) -> None:
    pixels = size.height * size.width
    if pixels > max_image_pixels:
        raise InputError(
            f"the image has {pixels / 1e6:.1f} megapixels; the limit is {max_image_pixels / 1e6:g}; "
            f"resize it or pass max_image_pixels"
        )
    check_size(size)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # A picture with a garbled EXIF block is still a picture; it is taken as it lies.
    except Exception:
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    if orientation in _TURNS:
        return image.transpose(_TURNS[orientation])
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey_to_8_bits(np.asarray(image))).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Pillow converts premultiplied grey only to plain grey with alpha.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey_to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale grey values of more than 8 bits to 0..255.

    Pillow's 32-bit modes I and F do not say what is white, so the smallest usual range that holds all values
    is taken: 0..1 (floats only), 0..255, 0..65535; failing these, the image's own lowest to highest value.
    """
    if values.dtype.itemsize == 2:
        return _scaled(values, 0, 65535)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all():
        raise InputError("some pixels are not finite numbers; replace them")
    whites = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
    white = next((white for white in whites if low >= 0 and high <= white), None)
    return _scaled(values, low, high) if white is None else _scaled(values, 0, white)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    numbers = values.astype(np.result_type(values.dtype, np.float32))
    return np.rint((numbers - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def _check_array(array: NDArray[Any]) -> None:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"the shape is {array.shape}; give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype.kind not in "fb" and not (array.dtype.kind == "u" and array.dtype.itemsize <= 2):
        raise InputError(f"the dtype is {array.dtype}; give uint8, uint16, bool, or floats from 0 to 1")


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype.kind == "f" and not (array.min() >= 0 and array.max() <= 1):
        raise InputError(
            f"the floats run from {array.min():g} to {array.max():g}; scale them to 0..1, or give uint8 from 0 to 255"
        )
    white = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
    pixels = array if array.dtype == np.uint8 else _scaled(array, 0, white)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
