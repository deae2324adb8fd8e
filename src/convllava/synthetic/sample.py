"""One generated sample: the picture, its caption, its questions, and the boxes of everything on it."""

import string
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from convllava.geometry import Box

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + ".,:-/$%&'()#+"
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "hexagon")
SIMPLE_SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
TASKS = ("shape", "colour", "position", "count", "read", "field", "table", "chart", "ground")


@dataclass(frozen=True)
class Turn:
    """One question and its only correct answer.

    Attributes:
        task: One of `TASKS`.
        question, answer: The texts.
        evidence: Boxes that show the answer if it is not printed as such: for a count, the box of each counted thing
            (or of the first character of each counted word, line or row); for a value of a chart, its bar, point or
            printed number. Empty for all other questions.
    """

    task: str
    question: str
    answer: str
    evidence: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Glyph:
    """One printed character that is not a space.

    Attributes:
        char: The character.
        box: Box of its ink, in pixels.
        begins: True for the first character of a word. The width of the gap before it would not show this reliably,
            because fonts differ too much.
    """

    char: str
    box: Box
    begins: bool = False


@dataclass(frozen=True)
class Thing:
    """One drawn shape and its box in pixels. A bar of a chart has the shape "bar"."""

    shape: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Numbered:
    """A printed or drawn piece that has a number on its page. All numbers start at 1; 0 means that it has none.

    Attributes:
        box: Box of its ink, in pixels.
        row: Number of its line, or of its table row (the header is 0).
        place: Number of a word in its line or sign, of a table's column, of a chart's bar or point, or of a scene's
            thing.
        value: The value that a chart shows there.
    """

    box: Box
    row: int = 0
    place: int = 0
    value: int = 0


@dataclass(frozen=True)
class Sample:
    """One generated picture and everything that is known about it. All boxes are in pixels of `image`.

    Attributes:
        index: Its number in the world.
        kind: Kind of page, such as "receipt".
        image: The picture, RGB.
        caption: Description of a scene, or transcription of a page in reading order.
        turns: Questions and answers.
        glyphs: All printed characters.
        things: All drawn shapes.
        numbered: The pieces that questions count or name by a number.
        layout: The discrete choices of its arrangement; the splits share none.
        fonts: The font families on it; the splits share none.
    """

    index: int
    kind: str
    image: Image.Image
    caption: str
    turns: tuple[Turn, ...]
    glyphs: tuple[Glyph, ...]
    things: tuple[Thing, ...]
    numbered: tuple[Numbered, ...] = ()
    layout: tuple[str, ...] = ()
    fonts: tuple[str, ...] = ()


def box_text(box: Box, width: float, height: float) -> str:
    """Write a box as the model reads and writes it: "[0.12, 0.34, 0.50, 0.60]".

    The box is in pixels of an image of `width` x `height`; the written numbers are shares of its sides, 0.00 to 0.99.
    """
    fractions = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    return "[" + ", ".join(f"{min(max(fraction, 0.0), 0.99):.2f}" for fraction in fractions) + "]"


def union(boxes: Iterable[Box]) -> Box:
    """Return the smallest box around one or more boxes."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def position_of(box: Box, width: float, height: float) -> str:
    """Return which cell of a 3x3 grid over the picture holds the centre of the box: one of `POSITIONS`."""
    column = min(int(3 * (box[0] + box[2]) / 2 / width), 2)
    row = min(int(3 * (box[1] + box[3]) / 2 / height), 2)
    return POSITIONS[3 * row + column]
