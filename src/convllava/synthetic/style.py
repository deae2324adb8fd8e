"""The look of a page: its colours, and the random numbers, words, fonts and layouts that it is drawn with."""

import math
import random
from dataclasses import dataclass, field

from convllava.synthetic.canvas import Canvas, Colour, PageFullError
from convllava.synthetic.fonts import Font, Typeface, font, font_size, typefaces
from convllava.synthetic.questions import SIMPLE_ITEMS, Draft, closed_words
from convllava.synthetic.sample import SHAPES, SIMPLE_SHAPES
from convllava.synthetic.splits import layouts
from convllava.synthetic.words import pool, pseudo_word

STRIDE = 64
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (20, 20, 20)
PAINTS: dict[str, Colour] = {
    "red": (215, 30, 35), "orange": (250, 135, 20), "yellow": (250, 220, 40), "green": (35, 155, 60),
    "blue": (35, 85, 215), "purple": (125, 40, 165), "pink": (250, 140, 190), "brown": (115, 65, 30),
    "black": (18, 18, 18), "grey": (128, 128, 128), "white": (252, 252, 252),
}  # fmt: skip
INKS: tuple[Colour, ...] = (
    (15, 15, 15), (30, 35, 45), (20, 40, 90), (90, 20, 30),
    (20, 70, 40), (70, 30, 90), (60, 60, 60), (110, 50, 10),
)  # fmt: skip
PAPERS: tuple[Colour, ...] = (
    (255, 255, 255), (250, 250, 245), (245, 240, 225), (235, 240, 250),
    (255, 245, 210), (240, 250, 235), (225, 225, 225), (250, 230, 230),
)  # fmt: skip
VIVID: tuple[Colour, ...] = (
    (170, 30, 35), (20, 70, 150), (15, 100, 60), (90, 40, 120),
    (130, 70, 20), (30, 110, 120), (40, 40, 50), (160, 60, 90),
)  # fmt: skip
WALLS: tuple[Colour, ...] = (
    (120, 130, 125), (190, 185, 175), (150, 110, 90), (95, 120, 80),
    (140, 170, 200), (70, 70, 75), (215, 210, 200),
)  # fmt: skip
DESKS: tuple[Colour, ...] = ((90, 80, 70), (60, 70, 80), (130, 120, 105), (100, 60, 40), (70, 90, 70))
LIGHT_GROUNDS: tuple[Colour, ...] = (
    (245, 245, 245), (255, 255, 255), (215, 215, 215), (215, 230, 250), (220, 240, 215), (250, 240, 205),
)  # fmt: skip
GROUNDS: tuple[Colour, ...] = (
    *LIGHT_GROUNDS, (245, 220, 220), (185, 205, 220), (200, 190, 165),
    (25, 30, 50), (40, 40, 40), (20, 50, 45), (60, 30, 60),
)  # fmt: skip


def jitter(rng: random.Random, colour: Colour, amount: int = 8) -> Colour:
    """Return `colour` with each channel changed by up to `amount`."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def blend(first: Colour, second: Colour, share: float) -> Colour:
    """Return the mixture of two colours with a share of the second one."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def paint(rng: random.Random, colour: str) -> Colour:
    """Return a random shade of a named colour. Greys get no tint."""
    if colour in ("black", "grey", "white"):
        return blend(PAINTS[colour], (128, 128, 128), rng.uniform(0, 0.1))
    return jitter(rng, PAINTS[colour], 10)


def luminance(colour: Colour) -> float:
    """Return the brightness of a colour, 0-255 (ITU-R BT.601)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def contrasting(background: Colour) -> Colour:
    """Return black or white, whichever is easier to read on `background`."""
    return BLACK if luminance(background) > 135 else WHITE


def is_visible(colour: str, ground: Colour) -> bool:
    """Return whether something painted in the named colour is easy to see on `ground`."""
    red, green, blue = (a - b for a, b in zip(PAINTS[colour], ground, strict=True))
    return math.sqrt(0.8 * red * red + 1.4 * green * green + 0.8 * blue * blue) > 95


@dataclass
class Drawing:
    """A drawn page: its canvas, caption, all possible questions, layout, largest rotation in degrees, and fonts."""

    canvas: Canvas
    caption: str
    drafts: list[Draft]
    layout: tuple[str, ...]
    max_rotation: float = 3.0
    fonts: tuple[str, ...] = ()


@dataclass
class Context:
    """Everything that a page is drawn with: the random numbers of one sample, and its split's words, fonts and layouts.

    Lengths are given for a picture of size 384 and scaled with `size`, the square root of the picture's area in pixels.
    """

    rng: random.Random
    split: str
    size: int
    simple: bool = False
    system_fonts: bool = False
    typeface: Typeface = field(init=False)

    def __post_init__(self) -> None:
        self.typeface = self.rng.choice(typefaces(self.split, self.simple, self.system_fonts))
        self.case = "title" if self.simple else self.rng.choice(("title", "title", "upper", "lower"))

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shapes that can occur."""
        return SIMPLE_SHAPES if self.simple else SHAPES

    def layout(self, kind: str) -> tuple[str, ...]:
        """Choose a layout of `kind` that the split owns."""
        return self.rng.choice(layouts(kind, self.split))

    def pixels(self, at_384: float) -> int:
        """Return a length in pixels that is `at_384` in a picture of size 384."""
        return max(1, round(at_384 * self.size / 384))

    def regular(self, at_384: float) -> Font:
        """Return the page's regular face, `at_384` pixels high in a picture of size 384."""
        return font(self.typeface.regular, font_size(at_384 * self.size / 384))

    def bold(self, at_384: float) -> Font:
        """Return the page's bold face, sized as in `regular`."""
        return font(self.typeface.bold, font_size(at_384 * self.size / 384))

    def fit(self, text: str, width: float, ideal: float, bold: bool = False) -> Font:
        """Return the largest face up to `ideal` (at size 384) in which `text` is at most `width` pixels wide.

        Raises:
            PageFullError: if the smallest face is too wide.
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
        """Return an open word in lower case: an everyday word of `role`, or equally often an invented word."""
        if self.rng.random() < 0.5:
            words = pool(role, self.split, closed_words(), longest)
            if words:
                return self.rng.choice(words).lower()
        return pseudo_word(self.rng, self.split, closed_words(), longest)

    def words(self, count: int, role: str, longest: int = 9) -> list[str]:
        """Return different open words of `role` in the page's case; in the simple world, items of a fixed list."""
        if self.simple:
            return [self.cased(word) for word in self.rng.sample(SIMPLE_ITEMS, count)]
        found: list[str] = []
        while len(found) < count:
            word = self.cased(self.word(role, longest))
            if word not in found:
                found.append(word)
        return found

    def cased(self, text: str) -> str:
        """Return `text` in the page's case."""
        return {"title": text.title, "upper": text.upper, "lower": text.lower}[self.case]()

    def extent(self, lowest: float, highest: float) -> tuple[int, int]:
        """Draw a picture's width and height: multiples of 64, with height/width roughly within the bounds.

        The area is `size` squared to about 10 %, or as near as multiples of 64 allow.
        """
        ratio = math.exp(self.rng.uniform(math.log(lowest), math.log(highest)))
        width = max(1, round(self.size / math.sqrt(ratio) / STRIDE))
        area = self.rng.uniform(0.9, 1.1) * self.size * self.size
        height = max(1, round(area / width / STRIDE / STRIDE))
        return width * STRIDE, height * STRIDE

    def aspect(self, name: str) -> tuple[int, int]:
        """Draw width and height for the layout choice "tall", "square" or "wide"."""
        bounds = {"tall": (1.25, 2.0), "square": (0.8, 1.25), "wide": (0.5, 0.8)}
        return self.extent(*bounds[name])

    def colours(self, dark: float = 0.15) -> tuple[Colour, Colour]:
        """Choose a background and an ink that contrast; light on dark with probability `dark`."""
        light, deep = self.rng.choice(PAPERS), self.rng.choice(INKS)
        if self.simple:
            return light, INKS[0]
        if self.rng.random() < dark:
            light, deep = deep, light
        return jitter(self.rng, light), deep
