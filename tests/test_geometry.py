"""Sizes, tokens and boxes of `convllava.geometry` for any image."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from convllava.errors import InputError
from convllava.geometry import (
    MODES,
    Box,
    Mode,
    Placement,
    Size,
    crop,
    grid,
    native,
    place,
    short_side,
    square,
    unchanged,
    visual_tokens,
)

strides = st.sampled_from([1, 7, 32, 64])
sides = st.integers(1, 6000)
placeable = st.builds(Size, sides, sides).filter(lambda size: max(size) <= 200 * min(size))


@st.composite
def budgets(draw: st.DrawFn, stride: int = 64) -> tuple[int, int]:
    least = draw(st.integers(1, 1000 * stride**2))
    return least, draw(st.integers(max(least, stride**2), 4000 * stride**2))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    mode: Mode = draw(st.sampled_from(MODES))
    return place(draw(placeable), mode, stride=32, max_pixels=640 * 640, side=draw(st.sampled_from([96, 256])))


@st.composite
def boxes(draw: st.DrawFn, size: Size) -> Box:
    x0, x1 = sorted(draw(st.tuples(st.floats(0, size.width), st.floats(0, size.width))))
    y0, y1 = sorted(draw(st.tuples(st.floats(0, size.height), st.floats(0, size.height))))
    return (x0, y0, x1, y1)


@given(placeable, budgets())
def test_native_canvas_is_multiples_of_the_stride_within_the_budget(size: Size, budget: tuple[int, int]) -> None:
    least, most = budget
    canvas = native(size, min_pixels=least, max_pixels=most).canvas
    rows, columns = grid(canvas, 64)
    assert rows >= 1
    assert columns >= 1
    assert canvas.height * canvas.width <= most
    if most // 64**2 >= 4 * math.ceil(least / 64**2):
        assert canvas.height * canvas.width >= least


@given(placeable, strides)
def test_native_rounds_to_the_nearest_cells_when_the_budget_allows(size: Size, stride: int) -> None:
    canvas = native(size, stride=stride, min_pixels=1, max_pixels=10**9).canvas
    for side, length in zip(canvas, size, strict=True):
        assert abs(side - length) <= stride / 2 or side == stride


@given(placeable, budgets())
def test_native_is_the_rounding_of_some_scaling_of_the_image(size: Size, budget: tuple[int, int]) -> None:
    """So each side differs by at most half a cell from the true aspect ratio."""
    cells = grid(native(size, min_pixels=budget[0], max_pixels=budget[1]).canvas, 64)
    lowest = max((cell - 0.5) / length if cell > 1 else 0.0 for cell, length in zip(cells, size, strict=True))
    highest = min((cell + 0.5) / length for cell, length in zip(cells, size, strict=True))
    assert lowest <= highest * (1 + 1e-12)


@given(placeable, budgets(), st.integers(0, 10**7))
def test_a_larger_budget_never_shrinks_the_canvas(size: Size, budget: tuple[int, int], more: int) -> None:
    least, most = budget
    small = native(size, min_pixels=least, max_pixels=most).canvas
    large = native(size, min_pixels=least, max_pixels=most + more).canvas
    assert small.height <= large.height
    assert small.width <= large.width


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(2, 5), budgets())
def test_a_larger_image_never_gets_a_smaller_canvas(
    height: int, width: int, times: int, budget: tuple[int, int]
) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    least, most = budget
    small = native(Size(height, width), min_pixels=least, max_pixels=most).canvas
    large = native(Size(times * height, times * width), min_pixels=least, max_pixels=most).canvas
    assert small.height <= large.height
    assert small.width <= large.width


@given(placeable, budgets())
def test_native_of_a_turned_image_is_the_turned_canvas(size: Size, budget: tuple[int, int]) -> None:
    least, most = budget
    upright = native(size, min_pixels=least, max_pixels=most).canvas
    turned = native(Size(size.width, size.height), min_pixels=least, max_pixels=most).canvas
    assert turned == Size(upright.width, upright.height)


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        (Size(1536, 1536), Size(1536, 1536)),
        (Size(768, 1024), Size(768, 1024)),
        (Size(95, 96), Size(128, 128)),
        (Size(300, 417), Size(320, 448)),
        (Size(10, 2000), Size(64, 1984)),
        (Size(30, 30), Size(128, 128)),
        (Size(3000, 3000), Size(1536, 1536)),
        (Size(3000, 2000), Size(1856, 1216)),
        (Size(100, 20000), Size(64, 19200)),
    ],
)
def test_native_with_default_settings(size: Size, canvas: Size) -> None:
    assert native(size).canvas == canvas


def test_native_keeps_max_pixels_if_both_bounds_cannot_hold() -> None:
    assert native(Size(64, 64), min_pixels=5 * 64**2, max_pixels=8 * 64**2).canvas == Size(128, 128)


@given(placeable, st.integers(1, 2000), strides)
def test_short_side_reaches_side_and_keeps_the_aspect_ratio(size: Size, side: int, stride: int) -> None:
    canvas = short_side(size, side=side, stride=stride).canvas
    grid(canvas, stride)
    short, long = sorted(canvas)
    assert abs(short - side) <= stride / 2 or short == stride
    assert abs(long - short * max(size) / min(size)) <= stride / 2
    assert (canvas.height >= canvas.width) == (size.height >= size.width) or short == long


@given(placeable, st.integers(1, 600))
def test_short_side_obeys_max_pixels(size: Size, cells: int) -> None:
    canvas = short_side(size, side=1536, max_pixels=cells * 64**2).canvas
    assert visual_tokens(canvas, 64) <= cells


@given(placeable, st.integers(1, 2000))
def test_square_is_the_official_formula(size: Size, side: int) -> None:
    placement = square(size, side=side)
    short, long = sorted(size)
    start = (long - short) // 2
    assert placement.padded == (long, long)
    assert placement.margin == ((0, start) if size.height > size.width else (start, 0))
    assert placement.resized == placement.canvas == (side, side)
    assert placement.scale_x == placement.scale_y == side / long


@given(placeable)
def test_crop_is_the_official_formula(size: Size) -> None:
    placement = crop(size, side=96)
    short, long = sorted(size)
    new_long = int(96 * long / short)
    assert sorted(placement.resized) == [96, new_long]
    assert sorted(placement.crop) == [0, (new_long - 96) // 2]
    assert placement.canvas == (96, 96)


@given(st.data(), placements())
def test_boxes_survive_conversion_in_both_directions(data: st.DataObject, placement: Placement) -> None:
    """Boxes on the canvas are exact; cropped parts are clipped to the edge of the visible part."""
    visible = placement.box_to_original((0, 0, placement.canvas.width, placement.canvas.height))
    x0, y0, x1, y1 = data.draw(boxes(placement.original))
    expected = (max(x0, visible[0]), max(y0, visible[1]), min(x1, visible[2]), min(y1, visible[3]))
    assume(expected[0] <= expected[2] and expected[1] <= expected[3])
    assert placement.box_to_original(placement.box_to_canvas((x0, y0, x1, y1))) == pytest.approx(expected, abs=1e-6)
    normalised = placement.box_to_normalised((x0, y0, x1, y1))
    assert all(0 <= number <= 1 for number in normalised)
    assert placement.box_from_normalised(normalised) == pytest.approx(expected, abs=1e-6)


@given(placements())
def test_box_of_the_whole_image_is_the_content(placement: Placement) -> None:
    height, width = placement.original
    assert placement.box_to_canvas((-9, -9, width + 9, height + 9)) == placement.content
    x0, y0, x1, y1 = placement.content
    assert 0 <= x0 < x1 <= placement.canvas.width
    assert 0 <= y0 < y1 <= placement.canvas.height


def test_boxes_of_a_padded_image() -> None:
    placement = square(Size(100, 200), side=400)
    assert placement.content == (0, 100, 400, 300)
    assert placement.box_to_canvas((10, 20, 30, 40)) == (20, 140, 60, 180)
    assert placement.box_to_original((0, 0, 400, 400)) == (0, 0, 200, 100)
    assert placement.box_to_normalised((0, 0, 100, 50)) == (0, 0.25, 0.5, 0.5)


def test_boxes_of_a_cropped_image() -> None:
    placement = crop(Size(100, 200), side=200)
    assert (placement.offset_x, placement.offset_y) == (-100, 0)
    assert placement.box_to_canvas((50, 0, 60, 10)) == (0, 0, 20, 20)
    assert placement.box_to_canvas((0, 0, 40, 10)) == (0, 0, 0, 20)
    assert placement.box_to_original((0, 0, 200, 200)) == (50, 0, 150, 100)


@given(st.integers(1, 40), st.integers(1, 40), strides)
def test_visual_tokens_are_rows_times_columns_plus_separators(rows: int, columns: int, stride: int) -> None:
    canvas = Size(rows * stride, columns * stride)
    assert grid(canvas, stride) == (rows, columns)
    assert visual_tokens(canvas, stride, row_separator=False) == rows * columns
    assert visual_tokens(canvas, stride, row_separator=True) == rows * columns + rows


def test_1536_pixels_are_576_tokens_as_in_the_paper() -> None:
    assert visual_tokens(place(Size(700, 900), "square", side=1536).canvas) == 576


@given(placeable, st.sampled_from(MODES))
def test_place_equals_the_function_of_the_mode(size: Size, mode: Mode) -> None:
    expected = {
        "native": native(size, stride=32, min_pixels=5000, max_pixels=90000),
        "short_side": short_side(size, side=96, stride=32, max_pixels=90000),
        "square": square(size, side=96),
        "crop": crop(size, side=96),
    }
    assert place(size, mode, stride=32, min_pixels=5000, max_pixels=90000, side=96) == expected[mode]


def test_unchanged_canvas_is_the_image() -> None:
    placement = unchanged(Size(128, 64))
    assert placement.canvas == (128, 64)
    assert placement.box_to_canvas((1, 2, 3, 4)) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native(Size(0, 5)), "5x0 .* empty"),
        (lambda: native(Size(5, -1)), "-1x5 .* empty"),
        (lambda: native(Size(1, 201)), "201x1 .* 200:1"),
        (lambda: square(Size(30000, 1), side=64), "1x30000 .* 200:1"),
        (lambda: native(Size(9, 9), stride=0), "`stride` is 0"),
        (lambda: native(Size(9, 9), min_pixels=-4), "`min_pixels` is -4"),
        (lambda: native(Size(9, 9), min_pixels=9000, max_pixels=8000), "9000 is more than `max_pixels` 8000"),
        (lambda: native(Size(9, 9), min_pixels=1, max_pixels=4095), "less than one visual token"),
        (lambda: short_side(Size(9, 9), side=0), "`side` is 0"),
        (lambda: square(Size(9, 9), side=-64), "`side` is -64"),
        (lambda: crop(Size(50, 9000), side=1536), "9000x50 .* too long to crop"),
        (lambda: place(Size(9, 9), "square", side=100), "multiples of the stride 64"),
        (lambda: place(Size(9, 9), "crop", side=100), "multiples of the stride 64"),
        (lambda: place(Size(9, 9), "nativ"), "'nativ'; choose one of native, square"),  # type: ignore[arg-type]
        (lambda: grid(Size(64, 65)), "65x64 .* multiples of the stride 64"),
        (lambda: grid(Size(0, 64)), "64x0"),
        (lambda: unchanged(Size(64, 100)), "100x64"),
    ],
)
def test_bad_input_is_rejected_in_one_line(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(InputError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", ["1536", 1536.5, float("nan"), True])
def test_settings_must_be_whole_numbers(value: object) -> None:
    for mode, name in (("square", "side"), ("short_side", "side"), ("native", "max_pixels"), ("native", "stride")):
        settings = {"stride": 64, "min_pixels": 4096, "max_pixels": 2**20, "side": 768} | {name: value}
        with pytest.raises(InputError, match=f"`{name}` must be a whole number; got"):
            place(Size(100, 200), mode=mode, **settings)
