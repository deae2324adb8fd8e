"""All arithmetic of sizes: image -> canvas -> grid -> visual tokens, and boxes from image to canvas and back.

The *canvas* is the input of the vision tower for one image. The tower turns every stride x stride square of it into one
visual token. This module does not use torch, transformers or Pillow.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple, get_args

from convllava.errors import ConfigError, ImageError

MAX_ASPECT_RATIO = 200
"""Most times that one side of an image may be as long as the other."""
MAX_CROP_PIXELS = 100_000_000
DEFAULT_STRIDE = 64
DEFAULT_MIN_PIXELS = 4 * DEFAULT_STRIDE**2
DEFAULT_MAX_PIXELS = 1536**2
DEFAULT_SIDE = 768

Mode = Literal["native", "square", "short_side", "crop"]
MODES: tuple[Mode, ...] = get_args(Mode)
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1; x to the right and y down, from the top left corner."""

_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(\d*\.?\d+)"] * 4) + r"\s*\]")


class Size(NamedTuple):
    """Height and width, in pixels or in cells of a grid (rows and columns)."""

    height: int
    width: int


class Offset(NamedTuple):
    """Pixels down and to the right."""

    top: int
    left: int


@dataclass(frozen=True)
class Placement:
    """How an image becomes a canvas.

    Every image mode has the same three steps, and each may change nothing: paste the image at `margin` into a
    background of size `padded`, resize that to `resized`, and cut out the canvas, whose top left corner is at `crop`.

    Attributes:
        original: Size of the image in pixels.
        padded: Size of the background in pixels of the image.
        margin: Position of the image in the background.
        resized: Size of the background after resizing.
        crop: Position of the canvas in the resized background.
        canvas: Size of the tower's input in pixels.
    """

    original: Size
    padded: Size
    margin: Offset
    resized: Size
    crop: Offset
    canvas: Size

    @property
    def scale_x(self) -> float:
        """Canvas pixels per image pixel, along a row: `x_canvas = x * scale_x + offset_x`."""
        return self.resized.width / self.padded.width

    @property
    def scale_y(self) -> float:
        """Canvas pixels per image pixel, down a column: `y_canvas = y * scale_y + offset_y`."""
        return self.resized.height / self.padded.height

    @property
    def offset_x(self) -> float:
        """Position of the image's left edge in the canvas; negative if cropped."""
        return self.margin.left * self.scale_x - self.crop.left

    @property
    def offset_y(self) -> float:
        """Position of the image's top edge in the canvas; negative if cropped."""
        return self.margin.top * self.scale_y - self.crop.top

    @property
    def content(self) -> Box:
        """The part of the canvas that shows the image; the rest is background."""
        return self.box_to_canvas((0, 0, self.original.width, self.original.height))

    def box_to_canvas(self, box: Box) -> Box:
        """Convert a box from image pixels to canvas pixels, clipped to both; a cropped box becomes empty."""
        x0, y0, x1, y1 = _clip(box, self.original)
        scaled = (
            x0 * self.scale_x + self.offset_x,
            y0 * self.scale_y + self.offset_y,
            x1 * self.scale_x + self.offset_x,
            y1 * self.scale_y + self.offset_y,
        )
        return _clip(scaled, self.canvas)

    def box_to_original(self, box: Box) -> Box:
        """Convert a box from canvas pixels to image pixels, clipped to the image."""
        x0, y0, x1, y1 = box
        scaled = (
            (x0 - self.offset_x) / self.scale_x,
            (y0 - self.offset_y) / self.scale_y,
            (x1 - self.offset_x) / self.scale_x,
            (y1 - self.offset_y) / self.scale_y,
        )
        return _clip(scaled, self.original)

    def box_to_normalised(self, box: Box) -> Box:
        """Convert a box from image pixels to fractions of the canvas, 0 to 1."""
        height, width = self.canvas
        x0, y0, x1, y1 = self.box_to_canvas(box)
        return (x0 / width, y0 / height, x1 / width, y1 / height)

    def box_from_normalised(self, box: Box) -> Box:
        """Convert a box from fractions of the canvas to image pixels, clipped to the image."""
        height, width = self.canvas
        x0, y0, x1, y1 = box
        return self.box_to_original((x0 * width, y0 * height, x1 * width, y1 * height))


def parse_boxes(text: str) -> Iterator[Box]:
    """Yield every "[0.12, 0.34, 0.50, 0.60]" in a text as a box in fractions, with ordered corners."""
    for found in _BOX.finditer(text):
        x0, y0, x1, y1 = (float(number) for number in found.groups())
        yield (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def parse_box(text: str) -> Box | None:
    """Return the first box of `parse_boxes`, or None."""
    return next(parse_boxes(text), None)


def cells_under(box: Box, cells: Size) -> set[tuple[int, int]]:
    """Return the (row, column) of every cell of a grid that a box covers.

    These are the cells whose centres are in the box, and the cell of the box's own centre, because a thin box may
    contain no cell's centre. An empty box, such as one that was cropped away, covers no cell.

    Args:
        box: In fractions of the canvas.
        cells: Rows and columns of the grid.
    """
    x0, y0, x1, y1 = box[0] * cells.width, box[1] * cells.height, box[2] * cells.width, box[3] * cells.height
    if x0 >= x1 or y0 >= y1:
        return set()
    rows = range(max(0, round(y0)), min(cells.height, round(y1)))
    columns = range(max(0, round(x0)), min(cells.width, round(x1)))
    return {(row, column) for row in rows for column in columns} | {centre_cell(box, cells)}


def centre_cell(box: Box, cells: Size) -> tuple[int, int]:
    """Return the (row, column) of the cell that contains the centre of a box in fractions of the canvas."""
    row, column = int((box[1] + box[3]) / 2 * cells.height), int((box[0] + box[2]) / 2 * cells.width)
    return min(row, cells.height - 1), min(column, cells.width - 1)


def check_size(size: Size) -> Size:
    """Return the size as a `Size`.

    Raises:
        ImageError: if a side is not positive, or one is more than `MAX_ASPECT_RATIO` times the other.
    """
    height, width = size
    if height <= 0 or width <= 0:
        raise ImageError(f"the image is {width}x{height} (width x height), which is empty; give one with pixels")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"the image is {width}x{height} (width x height), an aspect ratio beyond {MAX_ASPECT_RATIO}:1; "
            f"cut it into parts"
        )
    return Size(height, width)


def native(
    size: Size,
    *,
    stride: int = DEFAULT_STRIDE,
    min_pixels: int = DEFAULT_MIN_PIXELS,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Placement:
    """Keep the aspect ratio; round both sides to multiples of the stride, within a budget of pixels.

    If the rounded canvas is within the budget, the image keeps its size. Otherwise it is scaled only as far as
    necessary. So the canvas is always a scaled copy of the image with rounded sides (a side below one stride becomes
    one stride). It never shrinks when the image or the budget grows.

    Both bounds hold if `max_pixels` >= 4 * `min_pixels`, counted in whole stride x stride cells. If they are so close
    that no canvas is between them (2x2 cells, then 3x3), `max_pixels` holds and `min_pixels` does not.

    Raises:
        ImageError: if the size is bad (see `check_size`).
        ConfigError: if the stride is bad, or no canvas can be within the bounds.
    """
    size = check_size(size)
    least, most = _budget(stride, min_pixels, max_pixels)
    cells = Size(_round_cells(size.height, stride), _round_cells(size.width, stride))
    return _stretched(size, _shrink(_grow(cells, size, least), size, most), stride)


def short_side(size: Size, *, side: int, stride: int = DEFAULT_STRIDE, max_pixels: int | None = None) -> Placement:
    """Resize the short side to `side` and keep the aspect ratio: the paper's test of any aspect ratio.

    Source: arXiv 2405.15738, section 4.

    `side` and the long side are rounded to multiples of the stride. A canvas with more than `max_pixels` is scaled down
    until it fits; its short side is then shorter than `side`.

    Raises:
        ImageError: if the size is bad (see `check_size`).
        ConfigError: if side or stride is bad, or `max_pixels` is less than one visual token.
    """
    size = check_size(size)
    _check_positive(side=side, stride=stride)
    short = _round_cells(side, stride)
    cells = Size(_round_cells(short * size.height, min(size)), _round_cells(short * size.width, min(size)))
    if max_pixels is not None:
        cells = _shrink(cells, size, _budget(stride, 1, max_pixels)[1])
    return _stretched(size, cells, stride)


def square(size: Size, *, side: int) -> Placement:
    """Pad to a square with the image in the middle (rounded up and left), then resize: the official `pad`.

    Source: `expand2square` of LLaVA and ConvLLaVA, offset floor((long - short) / 2).

    Raises:
        ImageError: if the size is bad (see `check_size`).
        ConfigError: if the side is bad.
    """
    size = check_size(size)
    _check_positive(side=side)
    long = max(size)
    margin = Offset((long - size.height) // 2, (long - size.width) // 2)
    return Placement(size, Size(long, long), margin, Size(side, side), Offset(0, 0), Size(side, side))


def crop(size: Size, *, side: int) -> Placement:
    """Resize the short side to `side` and cut out the middle square: the official way without `pad`.

    Source: transformers 4.39 `CLIPImageProcessor`: the long side and the offset of the cut are rounded down.

    Raises:
        ImageError: if the size is bad (see `check_size`), or the image is so long that it would have more than
            `MAX_CROP_PIXELS` after resizing.
        ConfigError: if the side is bad.
    """
    size = check_size(size)
    _check_positive(side=side)
    resized = Size(side * size.height // min(size), side * size.width // min(size))
    if resized.height * resized.width > MAX_CROP_PIXELS:
        raise ImageError(
            f"the image is {size.width}x{size.height} (width x height), too long to crop to {side}x{side}; "
            f"cut it into parts, or choose the image mode native or square"
        )
    corner = Offset((resized.height - side) // 2, (resized.width - side) // 2)
    return Placement(size, size, Offset(0, 0), resized, corner, Size(side, side))


def unchanged(size: Size, *, stride: int = DEFAULT_STRIDE) -> Placement:
    """Use the image as its own canvas.

    Raises:
        ImageError: if the size is bad (see `check_size`).
        ConfigError: if a side is not a multiple of the stride.
    """
    size = check_size(size)
    grid(size, stride)
    return Placement(size, size, Offset(0, 0), size, Offset(0, 0), size)


def place(
    size: Size,
    mode: Mode,
    *,
    stride: int = DEFAULT_STRIDE,
    min_pixels: int = DEFAULT_MIN_PIXELS,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    side: int = DEFAULT_SIDE,
) -> Placement:
    """Place an image by the name of the mode.

    `native` uses `min_pixels` and `max_pixels`; `short_side` uses `side` and `max_pixels`; `square` and `crop` use
    `side`.

    Raises:
        ConfigError: if the mode is not known, or the `side` of square or crop is not a multiple of the stride.
        InputError: see the function of the mode.
    """
    match mode:
        case "native":
            return native(size, stride=stride, min_pixels=min_pixels, max_pixels=max_pixels)
        case "short_side":
            return short_side(size, side=side, stride=stride, max_pixels=max_pixels)
        case "square" | "crop":
            _check_positive(side=side)
            grid(Size(side, side), stride)
            return square(size, side=side) if mode == "square" else crop(size, side=side)
        case _:
            raise ConfigError(f"unknown image mode {mode!r}; choose one of {', '.join(MODES)}")


def grid(canvas: Size, stride: int = DEFAULT_STRIDE) -> Size:
    """Return the rows and columns of visual tokens.

    Raises:
        ConfigError: if a side is not a positive multiple of the stride.
    """
    _check_positive(stride=stride)
    height, width = canvas
    if height <= 0 or width <= 0 or height % stride or width % stride:
        raise ConfigError(
            f"a canvas of {width}x{height} (width x height) cannot be divided into cells of {stride}x{stride}; "
            f"make both sides multiples of the stride {stride}"
        )
    return Size(height // stride, width // stride)


def visual_tokens(canvas: Size, stride: int = DEFAULT_STRIDE, row_separator: bool = False) -> int:
    """Return the number of visual tokens of a canvas: rows x columns, and one more per row if rows are separated.

    `ConvLlavaProcessor.visual_tokens` gives the number for an image of any size.

    Raises:
        ConfigError: if a side is not a positive multiple of the stride.
    """
    rows, columns = grid(canvas, stride)
    return rows * (columns + int(row_separator))


def _stretched(size: Size, cells: Size, stride: int) -> Placement:
    canvas = Size(cells.height * stride, cells.width * stride)
    return Placement(size, size, Offset(0, 0), canvas, Offset(0, 0), canvas)


def _round_cells(length: int, cell: int) -> int:
    """Return the nearest number of cells (halves up), at least one. Integers avoid rounding errors of floats."""
    return max(1, (2 * length + cell) // (2 * cell))


def _grow(cells: Size, size: Size, least: int) -> Size:
    """Scale the image up until it rounds to `least` cells or more.

    When the scale t grows, a side of length L goes from n to n + 1 cells at t * L = n + 1/2 cells. So the next side to
    grow is the one with the smaller (2n + 1) / L; if both are equal, both grow.
    """
    rows, columns = cells
    while rows * columns < least:
        row_due, column_due = (2 * rows + 1) * size.width, (2 * columns + 1) * size.height
        rows, columns = rows + (row_due <= column_due), columns + (column_due <= row_due)
    return Size(rows, columns)


def _shrink(cells: Size, size: Size, most: int) -> Size:
    """Scale the image down until it rounds to `most` cells or fewer: the steps of `_grow` in reverse."""
    rows, columns = cells
    while rows * columns > most:
        row_due = (2 * rows - 1) * size.width if rows > 1 else 0
        column_due = (2 * columns - 1) * size.height if columns > 1 else 0
        rows, columns = rows - (row_due >= column_due), columns - (column_due >= row_due)
    return Size(rows, columns)


def _budget(stride: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the fewest and the most cells."""
    _check_positive(stride=stride, min_pixels=min_pixels, max_pixels=max_pixels)
    if min_pixels > max_pixels:
        raise ConfigError(f"`min_pixels` {min_pixels} is more than `max_pixels` {max_pixels}; swap or change them")
    check_max_pixels(max_pixels, stride)
    return -(-min_pixels // stride**2), max_pixels // stride**2


def check_max_pixels(max_pixels: int, stride: int = DEFAULT_STRIDE) -> None:
    """Raise ConfigError if `max_pixels` is less than one visual token."""
    if max_pixels < stride**2:
        raise ConfigError(f"`max_pixels` {max_pixels} is less than one visual token; give at least {stride**2}")


def _check_positive(**settings: int) -> None:
    for name, value in settings.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ConfigError(f"`{name}` must be a whole number; got {value!r}")
        if value <= 0:
            raise ConfigError(f"`{name}` is {value}; it must be positive")


def _clip(box: Box, size: Size) -> Box:
    x0, y0, x1, y1 = box
    height, width = size
    return (min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height))
