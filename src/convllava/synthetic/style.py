"""What a page is drawn with: the random numbers of one sample, and its split's words, fonts and layouts."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from convllava.synthetic.canvas import Canvas, PageFullError
from convllava.synthetic.fonts import Font, Typeface, font, font_size, typefaces
from convllava.synthetic.palette import INKS, PAPERS, Colour, jitter
from convllava.synthetic.questions import SIMPLE_ITEMS, Draft, closed_words
from convllava.synthetic.sample import SHAPES, SIMPLE_SHAPES
from convllava.synthetic.splits import layouts
from convllava.synthetic.words import pool, pseudo_word

STRIDE = 64


@dataclass
class Drawing:
    """A drawn page, its transcription, what could be asked about it, and the choices behind it."""

    canvas: Canvas
    caption: str
    drafts: list[Draft]
    layout: tuple[str, ...]
    steepest: float = 3.0
    fonts: tuple[str, ...] = ()


@dataclass
class Context:
    """The means of one sample. `size` is the square root of the picture's area in pixels."""

    rng: random.Random
    split: str
    size: int
    simple: bool = False
    system: bool = False
    typeface: Typeface = field(init=False)

    def __post_init__(self) -> None:
        self.typeface = self.rng.choice(typefaces(self.split, self.simple, self.system))
        self.case = "title" if self.simple else self.rng.choice(("title", "title", "upper", "lower"))

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shapes that occur."""
        return SIMPLE_SHAPES if self.simple else SHAPES

    def layout(self, kind: str) -> tuple[str, ...]:
        """An arrangement of `kind` that the split owns."""
        return self.rng.choice(layouts(kind, self.split))

    def pixels(self, at_384: float) -> int:
        """A length that is `at_384` pixels in a picture of size 384."""
        return max(1, round(at_384 * self.size / 384))

    def regular(self, at_384: float) -> Font:
        """The page's regular face, `at_384` pixels high in a picture of size 384."""
        return font(self.typeface.regular, font_size(at_384 * self.size / 384))

    def bold(self, at_384: float) -> Font:
        """The page's bold face, as `regular`."""
        return font(self.typeface.bold, font_size(at_384 * self.size / 384))

    def fit(self, text: str, width: float, ideal: float, bold: bool = False) -> Font:
        """The largest face not above `ideal` (at size 384) in which `text` is at most `width` pixels wide.

        Raises PageFullError when even the smallest is too wide.
        """
        make = self.bold if bold else self.regular
        face = make(ideal)
        while face.width(text) > width:
            smaller = make((face.size - 1) * 384 / self.size)
            if smaller.size == face.size:
                raise PageFullError
            face = smaller
        return face

    def word(self, role: str, longest: int = 9) -> str:
        """An open word in lower case: an everyday one of `role` or, as often, an invented one."""
        if self.rng.random() < 0.5:
            words = pool(role, self.split, closed_words(), longest)
            if words:
                return self.rng.choice(words).lower()
        return pseudo_word(self.rng, self.split, closed_words(), longest)

    def words(self, count: int, role: str, longest: int = 9) -> list[str]:
        """`count` different open words of `role` in the page's case; in the simple world, items it has a list of."""
        if self.simple:
            return [self.cased(word) for word in self.rng.sample(SIMPLE_ITEMS, count)]
        found: list[str] = []
        while len(found) < count:
            word = self.cased(self.word(role, longest))
            if word not in found:
                found.append(word)
        return found

    def cased(self, text: str) -> str:
        """`text` in the page's case."""
        return {"title": text.title, "upper": text.upper, "lower": text.lower}[self.case]()

    def extent(self, lowest: float, highest: float) -> tuple[int, int]:
        """Width and height of a picture, multiples of 64, whose height/width is about within the bounds.

        The area is `size` squared to about a tenth, or as near as multiples of 64 allow.
        """
        ratio = math.exp(self.rng.uniform(math.log(lowest), math.log(highest)))
        width = max(1, round(self.size / math.sqrt(ratio) / STRIDE))
        area = self.rng.uniform(0.9, 1.1) * self.size * self.size
        height = max(1, round(area / width / STRIDE / STRIDE))
        return width * STRIDE, height * STRIDE

    def aspect(self, name: str) -> tuple[int, int]:
        """Width and height for the layout choice "tall", "square" or "wide"."""
        bounds = {"tall": (1.25, 2.0), "square": (0.8, 1.25), "wide": (0.5, 0.8)}
        return self.extent(*bounds[name])

    def colours(self, dark: float = 0.15) -> tuple[Colour, Colour]:
        """A background and an ink that contrast, light on dark with probability `dark`."""
        light, deep = self.rng.choice(PAPERS), self.rng.choice(INKS)
        if self.simple:
            return light, INKS[0]
        if self.rng.random() < dark:
            light, deep = deep, light
        return jitter(self.rng, light), deep
