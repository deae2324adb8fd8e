"""The only arithmetic of size: image -> canvas -> grid -> visual tokens, and boxes there and back.

A *canvas* is what the vision tower sees of one image; the tower turns every stride x stride square of it into
one visual token. Nothing here knows of torch, transformers or Pillow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple, get_args

from convllava.errors import InputError

MAX_ASPECT_RATIO = 200
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
    """Height and width, in pixels or in cells of a grid."""

    height: int
    width: int


class Offset(NamedTuple):
    """Pixels down and to the right."""

    top: int
    left: int


@dataclass(frozen=True)
class Placement:
    """Where an image's pixels lie in the model's input.

    Every mode is the same three steps, any of which may do nothing: paste the image at `margin` into a
    background of size `padded`, resize that to `resized`, and look at it through a canvas whose top left
    corner lies at `crop`.

    Attributes:
        original: The image, in pixels.
        padded: The background the image is pasted into, in pixels of the image.
        margin: Where the image lies in `padded`.
        resized: `padded` after resizing.
        crop: Where the canvas lies in `resized`.
        canvas: What the vision tower sees.
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
        """Where the image's left edge lies in the canvas; negative if cropped."""
        return self.margin.left * self.scale_x - self.crop.left

    @property
    def offset_y(self) -> float:
        """Where the image's top edge lies in the canvas; negative if cropped."""
        return self.margin.top * self.scale_y - self.crop.top

    @property
    def content(self) -> Box:
        """The part of the canvas that shows the image; the rest is background."""
        return self.box_to_canvas((0, 0, self.original.width, self.original.height))

    def box_to_canvas(self, box: Box) -> Box:
        """A box in image pixels -> in canvas pixels, clipped to both; what is cropped away ends up empty."""
        x0, y0, x1, y1 = _clip(box, self.original)
        scaled = (
            x0 * self.scale_x + self.offset_x,
            y0 * self.scale_y + self.offset_y,
            x1 * self.scale_x + self.offset_x,
            y1 * self.scale_y + self.offset_y,
        )
        return _clip(scaled, self.canvas)

    def box_to_original(self, box: Box) -> Box:
        """A box in canvas pixels -> in image pixels, clipped to the image."""
        x0, y0, x1, y1 = box
        scaled = (
            (x0 - self.offset_x) / self.scale_x,
            (y0 - self.offset_y) / self.scale_y,
            (x1 - self.offset_x) / self.scale_x,
            (y1 - self.offset_y) / self.scale_y,
        )
        return _clip(scaled, self.original)

    def box_to_normalised(self, box: Box) -> Box:
        """A box in image pixels -> as fractions of the canvas, 0 to 1."""
        height, width = self.canvas
        x0, y0, x1, y1 = self.box_to_canvas(box)
        return (x0 / width, y0 / height, x1 / width, y1 / height)

    def box_from_normalised(self, box: Box) -> Box:
        """A box as fractions of the canvas -> in image pixels, clipped to the image."""
        height, width = self.canvas
        x0, y0, x1, y1 = box
        return self.box_to_original((x0 * width, y0 * height, x1 * width, y1 * height))


def parse_boxes(text: str) -> Iterator[Box]:
    """Every "[0.12, 0.34, 0.50, 0.60]" in a text, as fractions of the image, corners in order."""
    for found in _BOX.finditer(text):
        x0, y0, x1, y1 = (float(number) for number in found.groups())
        yield (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def parse_box(text: str) -> Box | None:
    """The first of `parse_boxes`; None where there is none."""
    return next(parse_boxes(text), None)


def cells_under(box: Box, cells: Size) -> set[tuple[int, int]]:
    """The (row, column) of every cell of a grid that a box in fractions of the canvas stands in.

    These are the cells whose centres it covers and always that of its own centre, because thin things miss centres;
    none where the box is empty, as when it was cropped away.
    """
    x0, y0, x1, y1 = box[0] * cells.width, box[1] * cells.height, box[2] * cells.width, box[3] * cells.height
    if x0 >= x1 or y0 >= y1:
        return set()
    rows = range(max(0, round(y0)), min(cells.height, round(y1)))
    columns = range(max(0, round(x0)), min(cells.width, round(x1)))
    return {(row, column) for row in rows for column in columns} | {centre_cell(box, cells)}


def centre_cell(box: Box, cells: Size) -> tuple[int, int]:
    """The (row, column) of the cell in which the centre of a box in fractions of the canvas lies."""
    row, column = int((box[1] + box[3]) / 2 * cells.height), int((box[0] + box[2]) / 2 * cells.width)
    return min(row, cells.height - 1), min(column, cells.width - 1)


def check_size(size: Size) -> Size:
    """The size as a `Size`.

    Raises:
        InputError: a side is not positive, or one is more than `MAX_ASPECT_RATIO` times the other.
    """
    height, width = size
    if height <= 0 or width <= 0:
        raise InputError(f"the image is {width}x{height} (width x height) and so empty; give one with pixels")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
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

    The image keeps its size if the rounded canvas is within the budget; else it is scaled just as far as the
    budget asks. So the canvas is always what some scaling of the image rounds to (a side below one stride
    becomes one stride), and never shrinks when the image or the budget grows.

    Both bounds hold whenever `max_pixels` >= 4 * `min_pixels`, counted in whole stride x stride cells. Where
    they lie so close that the aspect ratio jumps over both (2x2 cells, then 3x3), `max_pixels` holds and
    `min_pixels` not.

    Raises:
        InputError: a bad size (see `check_size`) or stride, or bounds that no canvas can meet.
    """
    size = check_size(size)
    least, most = _budget(stride, min_pixels, max_pixels)
    cells = Size(_round_cells(size.height, stride), _round_cells(size.width, stride))
    return _stretched(size, _shrink(_grow(cells, size, least), size, most), stride)


def short_side(size: Size, *, side: int, stride: int = DEFAULT_STRIDE, max_pixels: int | None = None) -> Placement:
    """Bring the short side to `side` and keep the aspect ratio: the paper's any-aspect test.

    Source: arXiv 2405.15738, section 4.

    `side` and the long side are rounded to multiples of the stride. A canvas beyond `max_pixels` is scaled
    down until it fits, so that the short side is then shorter than `side`.

    Raises:
        InputError: a bad size (see `check_size`), side or stride, or `max_pixels` below one visual token.
    """
    size = check_size(size)
    _check_positive(side=side, stride=stride)
    short = _round_cells(side, stride)
    cells = Size(
        _round_cells(short * size.height, min(size)),
        _round_cells(short * size.width, min(size)),
    )
    if max_pixels is not None:
        cells = _shrink(cells, size, _budget(stride, 1, max_pixels)[1])
    return _stretched(size, cells, stride)


def square(size: Size, *, side: int) -> Placement:
    """Pad to a square, the image in the middle (rounded up and left), then resize: the official `pad` way.

    Source: `expand2square` of LLaVA and ConvLLaVA, offset floor((long - short) / 2).

    Raises:
        InputError: a bad size (see `check_size`) or side.
    """
    size = check_size(size)
    _check_positive(side=side)
    long = max(size)
    margin = Offset((long - size.height) // 2, (long - size.width) // 2)
    return Placement(size, Size(long, long), margin, Size(side, side), Offset(0, 0), Size(side, side))


def crop(size: Size, *, side: int) -> Placement:
    """Bring the short side to `side` and cut the middle square: the official way without `pad`.

    Source: transformers 4.39 `CLIPImageProcessor`: the long side is rounded down, and so is the cut's offset.

    Raises:
        InputError: a bad size (see `check_size`) or side, or an image so long that its resized form, most of
            which is then cut away, would have more than `MAX_CROP_PIXELS`.
    """
    size = check_size(size)
    _check_positive(side=side)
    resized = Size(side * size.height // min(size), side * size.width // min(size))
    if resized.height * resized.width > MAX_CROP_PIXELS:
        raise InputError(
            f"the image is {size.width}x{size.height} (width x height), too long to crop to {side}x{side}; "
            f"cut it into parts, or choose the mode native or square"
        )
    corner = Offset((resized.height - side) // 2, (resized.width - side) // 2)
    return Placement(size, size, Offset(0, 0), resized, corner, Size(side, side))


def unchanged(size: Size, *, stride: int = DEFAULT_STRIDE) -> Placement:
    """The image is its own canvas.

    Raises:
        InputError: a bad size (see `check_size`), or a side that is no multiple of the stride.
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
    """The placement by the mode's name; each mode reads the settings it has.

    `native` reads `min_pixels` and `max_pixels`; `short_side` reads `side` and `max_pixels`; `square` and
    `crop` read `side`.

    Raises:
        InputError: an unknown mode, a `side` for square or crop that is no multiple of the stride, or what
            the mode itself refuses.
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
            raise InputError(f"unknown image mode {mode!r}; choose one of {', '.join(MODES)}")


def grid(canvas: Size, stride: int = DEFAULT_STRIDE) -> Size:
    """Rows and columns of visual tokens.

    Raises:
        InputError: a side is not a positive multiple of the stride.
    """
    _check_positive(stride=stride)
    height, width = canvas
    if height <= 0 or width <= 0 or height % stride or width % stride:
        raise InputError(
            f"a canvas of {width}x{height} (width x height) does not divide into cells of {stride}x{stride}; "
            f"make both sides multiples of the stride {stride}"
        )
    return Size(height // stride, width // stride)


def visual_tokens(canvas: Size, stride: int = DEFAULT_STRIDE, row_separator: bool = False) -> int:
    """Tokens the language model gets for one image: rows x columns, and one more after each row if separated.

    Raises:
        InputError: a side is not a positive multiple of the stride.
    """
    rows, columns = grid(canvas, stride)
    return rows * (columns + int(row_separator))


def _stretched(size: Size, cells: Size, stride: int) -> Placement:
    canvas = Size(cells.height * stride, cells.width * stride)
    return Placement(size, size, Offset(0, 0), canvas, Offset(0, 0), canvas)


def _round_cells(length: int, cell: int) -> int:
    """The nearest number of cells (halves up), at least one; in integers, so that no float error decides."""
    return max(1, (2 * length + cell) // (2 * cell))


def _grow(cells: Size, size: Size, least: int) -> Size:
    """Scale the image up until it rounds to `least` cells or more.

    As the scale t rises, a side of length L passes from n to n + 1 cells when t * L is n + 1/2 cells. So the
    next side to step is the one with the smaller (2n + 1) / L; when both come at once, both step.
    """
    rows, columns = cells
    while rows * columns < least:
        row_due, column_due = (2 * rows + 1) * size.width, (2 * columns + 1) * size.height
        rows, columns = rows + (row_due <= column_due), columns + (column_due <= row_due)
    return Size(rows, columns)


def _shrink(cells: Size, size: Size, most: int) -> Size:
    """Scale the image down until it rounds to `most` cells or fewer: the steps of `_grow` backwards."""
    rows, columns = cells
    while rows * columns > most:
        row_due = (2 * rows - 1) * size.width if rows > 1 else 0
        column_due = (2 * columns - 1) * size.height if columns > 1 else 0
        rows, columns = rows - (row_due >= column_due), columns - (column_due >= row_due)
    return Size(rows, columns)


def _budget(stride: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The fewest and the most cells."""
    _check_positive(stride=stride, min_pixels=min_pixels, max_pixels=max_pixels)
    if min_pixels > max_pixels:
        raise InputError(f"min_pixels {min_pixels} is more than max_pixels {max_pixels}; swap or change them")
    check_most(max_pixels, stride)
    return -(-min_pixels // stride**2), max_pixels // stride**2


def check_most(max_pixels: int, stride: int = DEFAULT_STRIDE) -> None:
    """Raises InputError where not one visual token has room in so many pixels."""
    if max_pixels < stride**2:
        raise InputError(f"max_pixels {max_pixels} is less than one visual token; give at least {stride**2}")


def _check_positive(**settings: int) -> None:
    for name, value in settings.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise InputError(f"{name} must be a whole number; got {value!r}")
        if value <= 0:
            raise InputError(f"{name} is {value}; it must be positive")


def _clip(box: Box, size: Size) -> Box:
    x0, y0, x1, y1 = box
    height, width = size
    return (
        min(max(x0, 0.0), width),
        min(max(y0, 0.0), height),
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
    )
