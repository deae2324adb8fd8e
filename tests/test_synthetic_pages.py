"""The pictures of the generated world: their sizes and brightness, and boxes that match the ink."""

from __future__ import annotations

import itertools
import re

import pytest
from PIL import Image, ImageChops, ImageStat

from convllava.data.dense_labels import printed_words
from convllava.synthetic import CHARACTERS, Box, Sample, World
from convllava.synthetic import world as world_module
from convllava.synthetic.augment import rotate
from convllava.synthetic.canvas import Canvas
from convllava.synthetic.splits import SPLITS


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw pages without rotation and noise."""
    monkeypatch.setattr(world_module, "degrade", lambda *_: None)


def test_pictures_are_rgb(samples: list[Sample]) -> None:
    assert all(isinstance(s.image, Image.Image) and s.image.mode == "RGB" for s in samples)


def test_pictures_have_many_shapes_and_the_right_area() -> None:
    sizes = {sample.image.size for sample in map(World(size=512).sample, range(60))}
    ratios = [height / width for width, height in sizes]
    assert min(ratios) < 0.7
    assert max(ratios) > 1.8
    assert len(sizes) > 10
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.8 < width * height / 512**2 < 1.25


def test_glyph_sheets_print_every_character() -> None:
    printed = {glyph.char for index in range(12) for glyph in World().glyph_sheet(index).glyphs}
    assert printed == set(CHARACTERS)


def test_min_brightness_changes_only_the_brightness() -> None:
    bright, dark = World(seed=5), World(seed=5, min_brightness=0.3)
    pairs = [(bright.sample(index), dark.sample(index)) for index in range(40)]
    light = [
        ImageStat.Stat(b.image.convert("L")).mean[0] / ImageStat.Stat(a.image.convert("L")).mean[0] for a, b in pairs
    ]
    assert all(a.glyphs == b.glyphs and a.caption == b.caption for a, b in pairs)
    assert 5 <= sum(share < 0.9 for share in light) <= 20
    assert min(light) > 0.25


def test_bars_are_as_long_as_their_values(untouched: None) -> None:
    world = World(size=384, kinds={"bar_chart": 1}, seed=2)
    evenness = []
    for sample in map(world.sample, range(30)):
        values = [int(value) for _, value in re.findall(r"(\w+) (\d+)[,.]", sample.caption)]
        side = 2 if sample.layout[0] == "horizontal" else 3
        lengths = [bar.box[side] - bar.box[side - 2] for bar in sample.things]
        rates = [length / value for length, value in zip(lengths, values, strict=True) if value > 20]
        assert len(lengths) == len(values)
        evenness += [min(rates) / max(rates)] if rates else []
    assert len(evenness) > 20
    assert min(evenness) > 0.9


def test_boxes_are_inside_the_picture(samples: list[Sample]) -> None:
    for sample in samples:
        for x0, y0, x1, y1 in [glyph.box for glyph in sample.glyphs] + [thing.box for thing in sample.things]:
            assert 0 <= x0 < x1 <= sample.image.width
            assert 0 <= y0 < y1 <= sample.image.height


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_words_are_separated_at_spaces(split: str) -> None:
    for kind, prefix in (("sign", "sign: "), ("paragraph", "paragraph: ")):
        world = World(split, kinds={kind: 1})
        for sample in map(world.sample, range(12)):
            text = sample.caption.removeprefix(prefix).removesuffix("." if kind == "sign" else "")
            if not text.startswith("title "):
                printed = ["".join(glyph.char for glyph in word) for word in printed_words(sample)]
                assert printed == text.replace(" / ", " ").split(" ")


def test_glyph_boxes_hold_ink(untouched: None) -> None:
    kinds = ("sign", "paragraph", "receipt", "form", "table")
    pages = [World(size=256, kinds={kind: 1}).sample(index) for kind in kinds for index in range(6)]
    pages += [World(size=256).glyph_sheet(index) for index in range(3)]
    for page in pages:
        grey = page.image.convert("L")
        for glyph in page.glyphs:
            x0, y0, x1, y1 = map(int, glyph.box)
            levels = grey.crop((x0 - 1, y0 - 1, x1 + 1, y1 + 1)).tobytes()
            assert max(levels) - min(levels) > 50, (page.kind, glyph)


def test_glyphs_of_a_page_do_not_overlap(untouched: None) -> None:
    for sample in map(World(size=256, seed=8).sample, range(60)):
        for (place, first), (other, second) in itertools.combinations(enumerate(sample.glyphs), 2):
            # Neighbours in a word can overlap, such as "fl".
            assert other == place + 1 or overlap(first.box, second.box) < 0.1, (sample.kind, first, second)


def overlap(first: Box, second: Box) -> float:
    """Return the shared area of two boxes as a fraction of the smaller box."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return max(width, 0) * max(height, 0) / min(areas)


@pytest.mark.parametrize("degrees", [-3.0, 2.5])
def test_boxes_follow_a_rotation(degrees: float) -> None:
    canvas = Canvas(320, 256, (255, 255, 255))
    canvas.shape("circle", "red", (255, 0, 0), (240, 30, 280, 70))
    rotate(canvas, degrees)
    seen = ImageChops.invert(canvas.image.getchannel("G")).point([0] * 128 + [255] * 128).getbbox()
    assert seen is not None
    assert seen != (240, 30, 280, 70)
    assert all(abs(a - b) < 2 for a, b in zip(seen, canvas.things[0].box, strict=True))


def test_glyph_sheets_are_dense_and_varied() -> None:
    for split in SPLITS:
        sheet = World(split=split, size=384).glyph_sheet(4)
        boxes = [glyph.box for glyph in sheet.glyphs] + [thing.box for thing in sheet.things]
        cells = {(int(box[0]) // 64, int(box[1]) // 64) for box in boxes}
        assert len(cells) > 0.8 * sheet.image.width * sheet.image.height / 64**2
        assert len(sheet.fonts) >= 2
        assert sheet.turns == ()
        assert {glyph.char.isupper() for glyph in sheet.glyphs} == {True, False}
