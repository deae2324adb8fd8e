"""The drawing surface: prints text and shapes and remembers where every character and every shape went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageDraw

from convllava.synthetic.fonts import Font
from convllava.synthetic.palette import Colour
from convllava.synthetic.sample import Box, Glyph, Numbered, Thing, union

_OVERSAMPLING = 4


class PageFullError(Exception):
    """What was to be drawn does not fit; the page is dealt again."""


@dataclass(frozen=True)
class Region:
    """A drawn piece: characters `start` to `stop` of the canvas, or the thing `thing`; `box` is its ink."""

    box: Box
    start: int = 0
    stop: int = 0
    thing: int | None = None


@dataclass
class Canvas:
    """A picture being drawn. Every drawing method raises PageFullError for what would leave the picture."""

    width: int
    height: int
    background: Colour
    image: Image.Image = field(init=False)
    glyphs: list[Glyph] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    numbers: list[tuple[Region, dict[str, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (self.width, self.height), self.background)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, text: str, x: float, y: float, font: Font, ink: Colour, anchor: str = "l") -> Region:
        """Print `text`, its capitals centred on height `y`, its left, middle or right end at `x`."""
        origins = font.origins(text)
        left = round(x - origins[-1] * {"l": 0.0, "m": 0.5, "r": 1.0}[anchor])
        baseline = round(y + font.capital / 2)
        start = len(self.glyphs)
        for before, char, origin in zip(" " + text, text, origins, strict=False):
            if char != " ":
                mask, (right, down) = font.mask(char)
                corner = left + round(origin) + right, baseline + down
                self.draw.bitmap(corner, mask, ink)
                box = (*corner, corner[0] + mask.width, corner[1] + mask.height)
                self.glyphs.append(Glyph(char, box, begins=before == " "))
        inside = self._inside(union(glyph.box for glyph in self.glyphs[start:]))
        return Region(inside, start, len(self.glyphs))

    def shape(self, shape: str, colour: str, fill: Colour, box: Box) -> Region:
        """Draw one of `SHAPES` filling the square `box` (whole pixels), its edges smooth."""
        self._inside(box)
        mask = shape_mask(shape, int(box[2] - box[0]))
        self.image.paste(fill, (int(box[0]), int(box[1])), mask)
        return self.note(shape, colour, box)

    def bar(self, colour: str, fill: Colour, box: Box) -> Region:
        """Draw a filled rectangle and remember it as a thing of the shape "bar"."""
        self.draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=fill)
        return self.note("bar", colour, self._inside(box))

    def note(self, shape: str, colour: str, box: Box) -> Region:
        """Remember a thing that is already drawn."""
        self.things.append(Thing(shape, colour, box))
        return Region(box, thing=len(self.things) - 1)

    def word(self, line: Region, number: int, text: str) -> Region:
        """The region of word `number` (from 0) of `text`, which was printed as `line`."""
        words = text.split(" ")
        start = line.start + sum(len(word) for word in words[:number])
        stop = start + len(words[number])
        return Region(union(glyph.box for glyph in self.glyphs[start:stop]), start, stop)

    def number(self, region: Region, **numbers: int) -> None:
        """Remember which row, place or value (see `Numbered`) a drawn piece has."""
        self.numbers.append((region, numbers))

    def number_words(self, lines: Sequence[str], regions: Sequence[Region], through: bool = False) -> None:
        """Number lines and the words of each; with `through`, words from the first line to the last."""
        place = 0
        for row, (line, region) in enumerate(zip(lines, regions, strict=True), start=1):
            place = place if through else 0
            for word in range(len(line.split(" "))):
                place += 1
                self.number(self.word(region, word, line), row=row, place=place)

    def numbered(self) -> tuple[Numbered, ...]:
        """What has numbers, as the picture stands now."""
        return tuple(Numbered(self.where(region), **numbers) for region, numbers in self.numbers)

    def where(self, region: Region) -> Box:
        """The box of `region` as the picture stands now, turned with the page."""
        if region.thing is not None:
            return self.things[region.thing].box
        return union(glyph.box for glyph in self.glyphs[region.start : region.stop])

    def mark(self, region: Region) -> Box:
        """Where to point at `region` as the picture stands now: its thing, or its first character."""
        return self.things[region.thing].box if region.thing is not None else self.glyphs[region.start].box

    def _inside(self, box: Box) -> Box:
        if box[0] < 1 or box[1] < 1 or box[2] > self.width - 1 or box[3] > self.height - 1:
            raise PageFullError
        return box


@lru_cache(maxsize=1024)
def shape_mask(shape: str, side: int) -> Image.Image:
    """An anti-aliased mask (mode "L", side x side pixels) of one of `SHAPES`, touching all four sides."""
    big = side * _OVERSAMPLING
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
    else:
        draw.polygon([(x * (big - 1), y * (big - 1)) for x, y in _outline(shape)], fill=255)
    return mask.reduce(_OVERSAMPLING)


@lru_cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape in the unit square, stretched to touch its sides."""
    points = _CORNERS[shape] if shape in _CORNERS else _curve(shape)
    left, top = min(x for x, _ in points), min(y for _, y in points)
    width, height = max(x for x, _ in points) - left, max(y for _, y in points) - top
    return tuple(((x - left) / width, (y - top) / height) for x, y in points)


def _curve(shape: str) -> list[tuple[float, float]]:
    if shape == "star":
        radii = (1.0, 0.42)
        turns = [math.pi * step / 5 for step in range(10)]
        return [
            (radii[step % 2] * math.sin(turn), -radii[step % 2] * math.cos(turn)) for step, turn in enumerate(turns)
        ]
    if shape == "hexagon":
        return [(math.cos(math.pi * step / 3), math.sin(math.pi * step / 3)) for step in range(6)]
    # The heart of https://mathworld.wolfram.com/HeartCurve.html
    angles = [2 * math.pi * step / 60 for step in range(60)]
    return [
        (
            16 * math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in angles
    ]


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [
        (0.32, 0), (0.68, 0), (0.68, 0.32), (1, 0.32), (1, 0.68), (0.68, 0.68),
        (0.68, 1), (0.32, 1), (0.32, 0.68), (0, 0.68), (0, 0.32), (0.32, 0.32),
    ],
}  # fmt: skip
