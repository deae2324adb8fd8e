"""The image processor: images of any kind and shape -> one padded array of pixels and the size of each image.

`convllava.geometry` decides the sizes, `convllava.model.images` decodes; here pixels are resized and normalised, with
Pillow and numpy only.
"""

from collections.abc import Iterator
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torch_tensor

from convllava.errors import ConfigError, ImageError
from convllava.geometry import (
    DEFAULT_MAX_PIXELS,
    DEFAULT_MIN_PIXELS,
    DEFAULT_SIDE,
    DEFAULT_STRIDE,
    Placement,
    Size,
    check_max_pixels,
    grid,
    place,
    unchanged,
)
from convllava.model.images import is_loaded, load_image

_PLACING = ("mode", "stride", "min_pixels", "max_pixels", "side")
SQUARE = ("square", "crop")
"""Modes with a square canvas."""
_CHANNELS = (1, 3, 4)
_STRIP_ROWS = 256
_SHORT_SIDE_ASPECT_RATIO = 8
"""Aspect ratio up to which `short_side` reaches `side` unless `max_pixels` is given."""


class ConvLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings of `ConvLlavaImageProcessorPil` in addition to the settings that every image processor has."""

    mode: str
    stride: int
    min_pixels: int
    max_pixels: int
    side: int


class ConvLlavaImageProcessorPil(PilBackend):
    """Images -> `pixel_values` and `image_sizes`.

    Args (of the constructor; each can also be given to a call):
        mode: How an image becomes a canvas; see the function of that name in `convllava.geometry`. `native` (default)
            and `short_side` keep the aspect ratio. `square` pads with the mean colour, int(255 * image_mean), and
            `crop` cuts: the two official ways, bit for bit.
        stride: Side of a visual token in pixels.
        min_pixels, max_pixels: Bounds of the canvas in pixels. `native` uses both, `short_side` the upper one: raise it
            to let the short side of a long image reach `side`.
        side: Side of the canvas in `square` and `crop`, its shorter side in `short_side`; in pixels.
        do_resize: If False, both sides of each image must be multiples of the stride.
        resample: Pillow's filter.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std: An 8-bit value v becomes
            (v * factor - mean) / std.

    A call takes one image or nested lists of images: everything that `images.load_image` takes (also paths; nothing is
    downloaded), tensors, and arrays with channels first. It returns

    - `pixel_values`: float32 (images, 3, height, width) with the largest height and width; zeros below and to the right
      of smaller images.
    - `image_sizes`: int64 (images, 2), height and width of each canvas.

    Raises:
        ImageError: if an image is bad.
        ConfigError: if settings contradict each other or do not exist.
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
        """Change some of the constructor's settings.

        `short_side` without `max_pixels` allows images up to eight times as long as wide. If `max_pixels` is below
        `min_pixels` and `min_pixels` is not given, both become `max_pixels`.

        Raises:
            ConfigError: if there is no such setting, or it contradicts the others.
        """
        for name in settings:
            if name not in self.valid_kwargs.__annotations__:
                raise ConfigError(f"the image processor has no setting {name!r}; it has {', '.join(_PLACING)}")
        if settings.get("mode") == "short_side" and "max_pixels" not in settings:
            settings["max_pixels"] = _SHORT_SIDE_ASPECT_RATIO * settings.get("side", self.side) ** 2
        if isinstance(settings.get("max_pixels"), int) and "min_pixels" not in settings:
            settings["min_pixels"] = min(self.min_pixels, settings["max_pixels"])
        _check_settings({name: getattr(self, name, None) for name in ("do_resize", *_PLACING)} | settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def placement(self, size: Size, /, **kwargs: Any) -> Placement:
        """Return how an image of this size becomes a canvas.

        Args:
            size: Height and width in pixels.
            kwargs: Settings of a call. Those that do not change sizes are ignored.

        Raises:
            InputError: if the size or a setting is bad.
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
        """Return settings that limit a canvas to `pixels`, for a call or for `placement`; {} if `pixels` is None.

        Raises:
            ConfigError: if `pixels` is less than one visual token.
        """
        if pixels is None:
            return {}
        check_max_pixels(pixels, self.stride)
        if self.mode in SQUARE:
            return {"side": isqrt(pixels) // self.stride * self.stride}
        return {"min_pixels": min(self.min_pixels, pixels), "max_pixels": pixels}

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Return the number of visual tokens of an image of this size, without row separators (vLLM calls this)."""
        settings = images_kwargs or {}
        placement = self.placement(Size(height, width), **settings)
        rows, columns = grid(placement.canvas, settings.get("stride") or self.stride)
        return rows * columns

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Decode images and keep the nesting. Arrays with channels are decoded later, because their layout is an
        argument of the call.

        Processors call this first. It replaces the version of transformers, which downloads URLs.
        """
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        has_channels = getattr(image_url_or_urls, "ndim", 0) > 2
        return image_url_or_urls if has_channels else load_image(image_url_or_urls)

    # The base class calls these with keywords only, so the narrower signatures (see the ignores) are safe.
    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Check the settings of the constructor and of every call: both pass through here."""
        _check_settings(kwargs)
        return super()._standardize_kwargs(**kwargs)

    def _validate_preprocess_kwargs(  # type: ignore[override]
        self, do_resize: bool | None = None, **kwargs: Any
    ) -> None:
        """Skip the base class's check of `do_resize`, which demands a `size`."""
        super()._validate_preprocess_kwargs(**kwargs)

    def _prepare_image_like_inputs(
        self, images: Any, *args: Any, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> list[Image.Image]:
        """Return a flat list of RGB Pillow images; Pillow resizes them later."""
        laid_out = (_channels_last(image, input_data_format) for image in _flatten(images))
        prepared = [image if is_loaded(image) else load_image(image) for image in laid_out]
        if not prepared:
            raise ImageError("the list of images is empty; give at least one image")
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
        # The arithmetic of the base class on 3 x 256 values instead of on every pixel: the same bits, but faster.
        values = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[..., np.newaxis]
        if kwargs["do_rescale"]:
            values = self.rescale(values, kwargs["rescale_factor"])
        if kwargs["do_normalize"]:
            values = self.normalize(values, image_mean, kwargs["image_std"])
        canvases = np.array([placement.canvas for placement in placements], dtype=np.int64)
        pixels = np.zeros((len(images), 3, *canvases.max(axis=0)), dtype=np.float32)
        for canvas, image, placement in zip(pixels, images, placements, strict=True):
            rendered = np.asarray(render(image, placement, resample, background))
            for channel, table in enumerate(values[..., 0].astype(np.float32)):
                # take() needs half the time of table[...]
                canvas[channel, : rendered.shape[0], : rendered.shape[1]] = table.take(rendered[..., channel])
        return BatchFeature({"pixel_values": pixels, "image_sizes": canvases}, tensor_type=return_tensors)


def mean_colour(image_mean: float | tuple[float, ...]) -> tuple[int, ...]:
    """Return the background of `square`: int(255 * mean), as in LLaVA; (122, 116, 104) for CLIP's means."""
    return tuple(int(mean * 255) for mean in np.broadcast_to(image_mean, 3).tolist())


def render(
    image: Image.Image, placement: Placement, resample: Image.Resampling | int, background: tuple[int, ...]
) -> Image.Image:
    """Return the 8-bit RGB canvas of an RGB image of size `placement.original`."""
    padded, margin = placement.padded, placement.margin
    if padded != placement.original:
        # Pillow resizes all rows first, to 8 bits, and then all columns. So padding and resizing the rows in strips
        # gives the same bits, and the padded square, up to 200 times as large as the image, never exists.
        rows = Image.new("RGB", (placement.resized.width, padded.height), background)
        for top in range(0, image.height, _STRIP_ROWS):
            bottom = min(top + _STRIP_ROWS, image.height)
            strip = Image.new("RGB", (padded.width, bottom - top), background)
            strip.paste(image.crop((0, top, image.width, bottom)), (margin.left, 0))
            rows.paste(strip.resize((placement.resized.width, bottom - top), resample), (0, margin.top + top))
        image = rows
    image = image.resize((placement.resized.width, placement.resized.height), resample)
    top, left = placement.crop
    return image.crop((left, top, left + placement.canvas.width, top + placement.canvas.height))


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        for item in images:
            yield from _flatten(item)
    else:
        yield images


def _channels_last(image: Any, input_data_format: str | ChannelDimension | None) -> Any:
    """Convert arrays and tensors with channels to numpy (H, W, channels).

    If the shape allows both layouts and `input_data_format` is not given, a tensor has its channels first and an array
    last.
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
    """Reject impossible modes, and settings of other image processors, which would have no effect."""
    for name in ("size", "crop_size", "pad_size", "do_center_crop", "do_pad"):
        if settings.get(name):
            raise ConfigError(f"the image processor has no {name}; set mode, side and max_pixels instead")
    if settings.get("do_convert_rgb") is False:
        raise ConfigError("do_convert_rgb is False, but the vision tower takes RGB only; leave it out")
    if settings.get("data_format") not in (None, ChannelDimension.FIRST):
        raise ConfigError("pixel_values have their channels first; leave data_format out")
    if settings.get("do_resize"):
        place(Size(1, 1), **{name: settings[name] for name in _PLACING})
