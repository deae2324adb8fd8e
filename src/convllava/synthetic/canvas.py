"""The drawing surface. It prints text and shapes, and records the box of every character and every shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageDraw

from convllava.synthetic.fonts import Font
from convllava.synthetic.sample import Box, Glyph, Numbered, Thing, union

Colour = tuple[int, int, int]
"""Red, green and blue, 0-255."""
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [
        (0.32, 0), (0.68, 0), (0.68, 0.32), (1, 0.32), (1, 0.68), (0.68, 0.68),
        (0.68, 1), (0.32, 1), (0.32, 0.68), (0, 0.68), (0, 0.32), (0.32, 0.32),
    ],
}  # fmt: skip


class PageFullError(Exception):
    """Something does not fit the page. The world then draws another page."""


@dataclass(frozen=True)
class Region:
    """A drawn piece: the characters `start` to `stop` of the canvas, or its thing number `thing`.

    `box` holds the ink before the page is rotated; `Canvas.box_of` returns the box on the finished page.
    """

    box: Box
    start: int = 0
    stop: int = 0
    thing: int | None = None


@dataclass
class Canvas:
    """A picture that is being drawn.

    Every drawing method raises PageFullError if its piece would leave the picture.
    """

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
        """Print `text`, its capitals centred on height `y`; `x` is its left, middle or right end ("l", "m", "r")."""
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
        line = self._check_inside(union(glyph.box for glyph in self.glyphs[start:]))
        return Region(line, start, len(self.glyphs))

    def shape(self, shape: str, colour: str, fill: Colour, box: Box) -> Region:
        """Draw one of `SHAPES` with smooth edges. It fills the square `box`, whose corners are whole pixels."""
        self._check_inside(box)
        mask = shape_mask(shape, int(box[2] - box[0]))
        self.image.paste(fill, (int(box[0]), int(box[1])), mask)
        return self.add_thing(shape, colour, box)

    def bar(self, colour: str, fill: Colour, box: Box) -> Region:
        """Draw a filled rectangle and record it as a thing of the shape "bar"."""
        self.draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=fill)
        return self.add_thing("bar", colour, self._check_inside(box))

    def add_thing(self, shape: str, colour: str, box: Box) -> Region:
        """Record a thing that is already drawn."""
        self.things.append(Thing(shape, colour, box))
        return Region(box, thing=len(self.things) - 1)

    def word(self, line: Region, number: int, text: str) -> Region:
        """Return the region of word `number` (from 0) of `text`, which was printed as `line`."""
        words = text.split(" ")
        start = line.start + sum(len(word) for word in words[:number])
        stop = start + len(words[number])
        return Region(union(glyph.box for glyph in self.glyphs[start:stop]), start, stop)

    def number(self, region: Region, **numbers: int) -> None:
        """Record the row, place or value (see `Numbered`) of a drawn piece."""
        self.numbers.append((region, numbers))

    def number_words(self, lines: Sequence[str], regions: Sequence[Region], through: bool = False) -> None:
        """Number the lines and the words of each line; with `through`, number the words of all lines as one
        sequence."""
        before = 0
        for row, (line, region) in enumerate(zip(lines, regions, strict=True), start=1):
            number = len(line.split(" "))
            for word in range(number):
                self.number(self.word(region, word, line), row=row, place=before + word + 1)
            before += number if through else 0

    def numbered(self) -> tuple[Numbered, ...]:
        """Return all pieces with a number, with their boxes on the page as it is now."""
        return tuple(Numbered(self.box_of(region), **numbers) for region, numbers in self.numbers)

    def box_of(self, region: Region) -> Box:
        """Return the box of `region` on the page as it is now, after any rotation."""
        if region.thing is not None:
            return self.things[region.thing].box
        return union(glyph.box for glyph in self.glyphs[region.start : region.stop])

    def _check_inside(self, box: Box) -> Box:
        if box[0] < 1 or box[1] < 1 or box[2] > self.width - 1 or box[3] > self.height - 1:
            raise PageFullError
        return box


@lru_cache(maxsize=1024)
def shape_mask(shape: str, side: int) -> Image.Image:
    """Return an anti-aliased mask (mode "L", side x side pixels) of one of `SHAPES`, which touches all four sides."""
    big = 4 * side  # reduced at the end, for smooth edges
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
        return mask.reduce(4)
    if shape in _CORNERS:
        points = _CORNERS[shape]
    elif shape == "star":
        points = [
            (radius * math.sin(math.pi * step / 5), -radius * math.cos(math.pi * step / 5))
            for step, radius in enumerate((1.0, 0.42) * 5)
        ]
    elif shape == "hexagon":
        points = [(math.cos(math.pi * step / 3), math.sin(math.pi * step / 3)) for step in range(6)]
    else:  # the heart of https://mathworld.wolfram.com/HeartCurve.html
        points = [
            (16 * math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)))
            for a in (2 * math.pi * step / 60 for step in range(60))
        ]
    left, top = min(x for x, _ in points), min(y for _, y in points)
    width, height = max(x for x, _ in points) - left, max(y for _, y in points) - top
    # Stretched so that the corners touch all sides.
    draw.polygon([((x - left) / width * (big - 1), (y - top) / height * (big - 1)) for x, y in points], fill=255)
    return mask.reduce(4)
