"""Decode an image of any kind to an upright RGB Pillow image, or explain in one line why that is not possible.

Nothing is downloaded, and the number of pixels is checked before they are decoded.
"""

import threading
import warnings
from io import BytesIO, UnsupportedOperation
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from convllava.errors import ImageError
from convllava.geometry import Size, check_size

MAX_IMAGE_PIXELS = 100_000_000
ImageSource = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[Any]

_LIMIT_LOCK = threading.Lock()
_EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CONTAINERS = ("BLP", "ICNS", "IPTC")
"""Formats that contain an image of another format. Their own header may state a wrong size for that image."""
_ICO_START = b"\0\0\1\0"
"""First bytes of ICO, another container."""


def load_image(source: ImageSource, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode one image to 8-bit RGB, turned upright by its EXIF orientation, on a white background.

    Args:
        source: A path, encoded bytes, a binary stream, a Pillow image, or an array of shape (H, W) or
            (H, W, 1 or 3 or 4) of uint8, uint16, bool, or floats from 0 to 1. The first frame of an animation is used;
            of a Pillow image, the current frame.
        max_image_pixels: Most pixels to decode.

    Returns:
        A new image of mode RGB without metadata. Loading it again changes nothing.

    Raises:
        ImageError: if the source is missing, no image or damaged, has no pixels or too many, or an aspect ratio beyond
            `geometry.MAX_ASPECT_RATIO`. The message begins with the name of the source.
    """
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source, max_image_pixels)
        if isinstance(source, Image.Image):
            return _decode(source, max_image_pixels)
        if isinstance(source, str | Path):
            with _open_file(source) as file, _read_header(file) as image:
                return _decode(image, max_image_pixels)
        if isinstance(source, bytes | bytearray | memoryview):
            return _decode(_read_header(BytesIO(source)), max_image_pixels)
        if hasattr(source, "read"):
            return _decode(_read_header(source), max_image_pixels)
        raise ImageError("not an image; give a path, bytes, a binary stream, a Pillow image or a numpy array")
    except ImageError as error:
        if isinstance(source, np.ndarray):
            name = "numpy array"
        elif isinstance(source, Image.Image):
            name = _one_line(getattr(source, "filename", "") or "Pillow image")
        elif isinstance(source, str | Path):
            name = _one_line(source)
        else:
            name = _one_line(getattr(source, "name", type(source).__name__))
        raise ImageError(f"{name}: {error}") from error.__cause__


def check_header(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> str:
    """Check the header of encoded bytes without decoding any pixels.

    Returns:
        Pillow's name of the format.

    Raises:
        ImageError: if `load_image` would reject the image because of its header.
    """
    with _read_header(BytesIO(data)) as image:
        _check_pixels(Size(image.height, image.width), max_image_pixels)
        return image.format or ""


def is_loaded(source: object) -> bool:
    """Return whether `load_image` would only copy this: a plain RGB image without metadata."""
    return type(source) is Image.Image and source.mode == "RGB" and not source.info


def _one_line(value: object) -> str:
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-70:]}"


def _open_file(path: str | Path) -> BinaryIO:
    if str(path).lower().startswith(("http://", "https://")):
        raise ImageError("nothing is downloaded; download it first and give the file's path")
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise ImageError("no such file; check the path") from None
    except IsADirectoryError:
        raise ImageError("a directory; give the path of an image file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot be read ({reason}); check the path") from error


def _read_header(file: BinaryIO) -> Image.Image:
    try:
        try:
            file.seek(0)
        except (AttributeError, UnsupportedOperation):  # a stream that cannot go back is read as a whole
            file = BytesIO(file.read())
        if file.read(len(_ICO_START)) == _ICO_START:  # Pillow decodes an ICO to read its size
            raise _container("ICO")
        try:
            with warnings.catch_warnings():
                # Pillow warns from 89 megapixels on; our own limit is checked next.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(file)
        except Image.DecompressionBombError:
            # Our limit may be higher than Pillow's. Pillow's limit is one variable for the whole process.
            with _LIMIT_LOCK:
                limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    return Image.open(file)
                finally:
                    Image.MAX_IMAGE_PIXELS = limit
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("empty, or not an image file of a known kind; convert it to PNG or JPEG") from error
    # Plugins raise nearly anything for hostile bytes: OSError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> ImageError:
    reason = _one_line(" ".join(str(error).split()) or type(error).__name__)
    return ImageError(f"damaged, cut short or of an unsupported kind ({reason}); save it again as PNG or JPEG")


def _container(kind: str) -> ImageError:
    return ImageError(f"{kind}, whose header may state a wrong size of the image inside; convert it to PNG")


def _decode(image: Image.Image, max_image_pixels: int) -> Image.Image:
    _check_pixels(Size(image.height, image.width), max_image_pixels)
    if image.format == "EPS":
        raise ImageError("PostScript, which is a program and not an image; convert it to PNG")
    if image.format in _CONTAINERS:
        raise _container(image.format)
    try:
        image.load()
        # The decoded image may be larger than its header said.
        _check_pixels(Size(image.height, image.width), max_image_pixels)
        upright = _to_rgb(image)
        try:
            orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:  # an image with a broken EXIF block is still an image; it is not turned
            orientation = 1
        if orientation in _EXIF_TRANSPOSE:
            upright = upright.transpose(_EXIF_TRANSPOSE[orientation])
        # Without this, the next reader would use the metadata to turn the image again.
        upright.info = {}
        return upright
    except ImageError:
        raise
    except Exception as error:  # see `_read_header`
        raise _damaged(error) from error


def _check_pixels(size: Size, max_image_pixels: int) -> None:
    pixels = size.height * size.width
    if pixels > max_image_pixels:
        raise ImageError(
            f"the image has {pixels / 1e6:.1f} megapixels; the limit is {max_image_pixels / 1e6:g}; "
            f"resize it or raise `max_image_pixels`"
        )
    check_size(size)


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

    Pillow's 32-bit modes I and F do not say which value is white. So the smallest usual range that contains all values
    is used: 0..1 (floats only), 0..255, 0..65535; otherwise the image's own lowest to highest value.
    """
    if values.dtype.itemsize == 2:
        return _scaled(values, 0, 65535)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all():
        raise ImageError("some pixels are not finite numbers; replace them")
    whites = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
    white = next((white for white in whites if low >= 0 and high <= white), None)
    return _scaled(values, low, high) if white is None else _scaled(values, 0, white)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    numbers = values.astype(np.result_type(values.dtype, np.float32))
    return np.rint((numbers - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def _from_array(array: NDArray[Any], max_image_pixels: int) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"the shape is {array.shape}; give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype.kind not in "fb" and not (array.dtype.kind == "u" and array.dtype.itemsize <= 2):
        raise ImageError(f"the dtype is {array.dtype}; give uint8, uint16, bool, or floats from 0 to 1")
    _check_pixels(Size(*array.shape[:2]), max_image_pixels)
    if array.dtype.kind == "f" and not (array.min() >= 0 and array.max() <= 1):
        raise ImageError(
            f"the floats run from {array.min():g} to {array.max():g}; scale them to 0..1, or give uint8 from 0 to 255"
        )
    white = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
    pixels = array if array.dtype == np.uint8 else _scaled(array, 0, white)
    return _to_rgb(Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))
