"""Pixels for the vision tower: images of any kind and shape -> one padded array and each image's own size.

Sizes come from `convllava.geometry`, decoding from `convllava.model.images`; here pixels are resized and
normalised, by Pillow and numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torch_tensor

from convllava.errors import InputError
from convllava.geometry import (
    DEFAULT_MAX_PIXELS,
    DEFAULT_MIN_PIXELS,
    DEFAULT_SIDE,
    DEFAULT_STRIDE,
    Placement,
    Size,
    check_most,
    grid,
    place,
    unchanged,
)
from convllava.model.images import is_loaded, load_image

_PLACING = ("mode", "stride", "min_pixels", "max_pixels", "side")
SQUARE = ("square", "crop")
"""Modes whose canvas has `side` for both sides."""
_CHANNELS = (1, 3, 4)
_STRIP_ROWS = 256
LONGEST = 8
"""How many times its short side an image may be long before its number of pixels decides."""


class ConvLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    """What `ConvLlavaImageProcessorPil` takes besides the usual settings of an image processor."""

    mode: str
    stride: int
    min_pixels: int
    max_pixels: int
    side: int


class ConvLlavaImageProcessorPil(PilBackend):
    """Images -> `pixel_values` and `image_sizes`.

    Args (of the constructor; each can also be given to a call):
        mode: How an image is brought to its canvas; see the function of that name in `convllava.geometry`.
            `native` (default) and `short_side` keep the aspect ratio; `square` pads with the mean colour,
            int(255 * image_mean), and `crop` cuts: the two official ways, bit for bit.
        stride: Pixels of a visual token's side.
        min_pixels, max_pixels: Bounds of the canvas, in pixels. `native` obeys both, `short_side` the upper
            one: raise it to let a long image's short side reach `side`.
        side: Of the canvas in `square` and `crop`, the shorter one in `short_side`; in pixels.
        do_resize: If False, images must come as canvases: both sides multiples of the stride.
        resample: Pillow's filter.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std: (v * factor - mean) / std, of 8-bit
            values v.

    A call takes one image or any nesting of lists of them: all that `images.load_image` takes (paths too;
    nothing is fetched from the network), tensors, and arrays with channels first. It returns

    - `pixel_values`: float32 (images, 3, height, width) of the largest height and width; zeros below and
      to the right.
    - `image_sizes`: int64 (images, 2), height and width of each image's canvas.

    Raises:
        InputError: a bad image; settings that contradict each other or that this class does not have.
    """

    valid_kwargs = ConvLlavaImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    mode = "native"
    stride = DEFAULT_STRIDE
    min_pixels = DEFAULT_MIN_PIXELS
    max_pixels = DEFAULT_MAX_PIXELS
    side = DEFAULT_SIDE
    do_convert_rgb = True
    do_resize = True
    resample = Image.Resampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def change(self, **settings: Any) -> None:
        """Set some of the constructor's settings anew; `short_side` without `max_pixels` leaves room for an image eight
        times as long as wide, and `max_pixels` alone takes `min_pixels` down with it.

        Raises:
            InputError: there is no such setting, or it cannot work with the others.
        """
        for name in settings:
            if name not in self.valid_kwargs.__annotations__:
                raise InputError(f"the image processor has no setting {name!r}; it has {', '.join(_PLACING)}")
        if settings.get("mode") == "short_side" and "max_pixels" not in settings:
            settings["max_pixels"] = LONGEST * settings.get("side", self.side) ** 2
        if isinstance(settings.get("max_pixels"), int) and "min_pixels" not in settings:
            settings["min_pixels"] = min(self.min_pixels, settings["max_pixels"])
        _check_settings({name: getattr(self, name, None) for name in ("do_resize", *_PLACING)} | settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def placement(self, size: Size, /, **kwargs: Any) -> Placement:
        """Where an image of this original size would lie in its canvas.

        Args:
            size: Height and width in pixels.
            kwargs: Settings to override, as of a call; those that do not bear on sizes are ignored.

        Raises:
            InputError: the size or a setting is bad.
        """
        settings = {name: getattr(self, name) for name in ("do_resize", *_PLACING)}
        settings |= {name: kwargs[name] for name in settings if kwargs.get(name) is not None}
        if not settings.pop("do_resize"):
            return unchanged(size, stride=settings["stride"])
        return place(size, **settings)

    @property
    def budget(self) -> int:
        """Most pixels of a canvas."""
        return self.side**2 if self.mode in SQUARE else self.max_pixels

    def within(self, pixels: int | None) -> dict[str, int]:
        """Settings, of `placement` or of a call, with which a canvas has at most so many pixels; None is the budget.

        Raises:
            InputError: no visual token has room in so few.
        """
        if pixels is None:
            return {}
        check_most(pixels, self.stride)
        if self.mode in SQUARE:
            return {"side": isqrt(pixels) // self.stride * self.stride}
        return {"min_pixels": min(self.min_pixels, pixels), "max_pixels": pixels}

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Cells of the grid for an image of this original size, without row separators (vLLM's hook)."""
        settings = images_kwargs or {}
        placement = self.placement(Size(height, width), **settings)
        rows, columns = grid(placement.canvas, settings.get("stride") or self.stride)
        return rows * columns

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Decode all but arrays with channels, whose layout only a call knows, and keep the nesting.

        Processors call it first. It stands in place of transformers' version, which fetches URLs.
        """
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        has_channels = getattr(image_url_or_urls, "ndim", 0) > 2
        return image_url_or_urls if has_channels else load_image(image_url_or_urls)

    # The base class calls these by keyword alone, so that the narrower signatures (the ignores below) are safe.
    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Sees the constructor's settings and every call's, so what would be ignored is refused here."""
        _check_settings(kwargs)
        return super()._standardize_kwargs(**kwargs)

    def _validate_preprocess_kwargs(  # type: ignore[override]
        self, do_resize: bool | None = None, **kwargs: Any
    ) -> None:
        """As in the base class, but for the `size` it asks for where images are resized."""
        super()._validate_preprocess_kwargs(**kwargs)

    def _prepare_image_like_inputs(
        self, images: Any, *args: Any, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> list[Image.Image]:
        """Flat list of RGB images. They stay Pillow images, because that is what gets resized."""
        laid_out = (_channels_last(image, input_data_format) for image in _flatten(images))
        prepared = [image if is_loaded(image) else load_image(image) for image in laid_out]
        if not prepared:
            raise InputError("the list of images is empty; give at least one image")
        return prepared

    def _preprocess(  # type: ignore[override]
        self,
        images: list[Image.Image],
        *args: Any,
        resample: Image.Resampling | int,
        image_mean: float | tuple[float, ...],
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        placements = [self.placement(Size(image.height, image.width), **kwargs) for image in images]
        background = mean_colour(image_mean)
        values = self._value_table(image_mean=image_mean, **kwargs)
        canvases = np.array([placement.canvas for placement in placements], dtype=np.int64)
        pixels = np.zeros((len(images), 3, *canvases.max(axis=0)), dtype=np.float32)
        for canvas, image, placement in zip(pixels, images, placements, strict=True):
            _write(render(image, placement, resample, background), values, canvas)
        return BatchFeature({"pixel_values": pixels, "image_sizes": canvases}, tensor_type=return_tensors)

    def _value_table(
        self,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """(3, 256): what each 8-bit value of each channel becomes.

        The base class's own arithmetic, on 768 numbers instead of on every pixel: the same bits, several
        times faster.
        """
        table = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[..., np.newaxis]
        if do_rescale:
            table = self.rescale(table, rescale_factor)
        if do_normalize:
            table = self.normalize(table, image_mean, image_std)
        return table[..., 0].astype(np.float32)


def mean_colour(image_mean: float | tuple[float, ...]) -> tuple[int, ...]:
    """The background of `square`: int(255 * mean), as in LLaVA; (122, 116, 104) for CLIP's means."""
    return tuple(int(mean * 255) for mean in np.broadcast_to(image_mean, 3).tolist())


def render(
    image: Image.Image, placement: Placement, resample: Image.Resampling | int, background: tuple[int, ...]
) -> Image.Image:
    """The 8-bit RGB canvas the tower sees of an RGB image of size `placement.original`."""
    resized = (placement.resized.width, placement.resized.height)
    if placement.padded != placement.original:
        image = _pad_rows_and_resize_them(image, placement, resample, background)
    image = image.resize(resized, resample)
    top, left = placement.crop
    return image.crop((left, top, left + placement.canvas.width, top + placement.canvas.height))


def _pad_rows_and_resize_them(
    image: Image.Image, placement: Placement, resample: Image.Resampling | int, background: tuple[int, ...]
) -> Image.Image:
    """The padded image with its width resized already, (resized.width x padded.height).

    Pillow itself resizes all rows first, to 8 bits, and then all columns. So a strip of rows at a time gives
    the same bits, and the padded square, 200 times the image at worst, never exists.
    """
    padded, margin, width = placement.padded, placement.margin, placement.resized.width
    result = Image.new("RGB", (width, padded.height), background)
    for top in range(0, image.height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, image.height)
        strip = Image.new("RGB", (padded.width, bottom - top), background)
        strip.paste(image.crop((0, top, image.width, bottom)), (margin.left, 0))
        result.paste(strip.resize((width, bottom - top), resample), (0, margin.top + top))
    return result


def _write(image: Image.Image, values: NDArray[np.float32], canvas: NDArray[np.float32]) -> None:
    """Look the image's (height, width, 3) bytes up into the top left corner of a (3, height, width) array."""
    pixels = np.asarray(image)
    for channel, table in enumerate(values):
        canvas[channel, : image.height, : image.width] = table.take(pixels[..., channel])  # half the time of table[...]


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        for item in images:
            yield from _flatten(item)
    else:
        yield images


def _channels_last(image: Any, input_data_format: str | ChannelDimension | None) -> Any:
    """Arrays and tensors -> numpy (H, W, channels).

    Unless told, the channels of a tensor are first and those of an array last, wherever the sizes allow both.
    """
    is_tensor = is_torch_tensor(image)
    array = image.detach().cpu().numpy() if is_tensor else image
    if not isinstance(array, np.ndarray) or array.ndim != 3:
        return array
    ambiguous = array.shape[0] in _CHANNELS and array.shape[-1] in _CHANNELS
    first = is_tensor if ambiguous else array.shape[0] in _CHANNELS
    if input_data_format is not None:
        first = ChannelDimension(input_data_format) is ChannelDimension.FIRST
    return array.transpose(1, 2, 0) if first else array


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings of other image processors that would do nothing, and modes that cannot work."""
    for name in ("size", "crop_size", "pad_size", "do_center_crop", "do_pad"):
        if settings.get(name):
            raise InputError(f"the image processor has no {name}; set mode, side and max_pixels instead")
    if settings.get("do_convert_rgb") is False:
        raise InputError("do_convert_rgb is False, but the vision tower takes RGB only; leave it out")
    if settings.get("data_format") not in (None, ChannelDimension.FIRST):
        raise InputError("pixel_values have their channels first; leave data_format out")
    if settings.get("do_resize"):
        place(Size(1, 1), **{name: settings[name] for name in _PLACING})
