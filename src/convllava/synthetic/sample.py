"""What a generated sample is: the picture, its caption, its questions, and where everything lies."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from convllava.geometry import Box

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + ".,:-/$%&'()#+"
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "hexagon")
SIMPLE_SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
TASKS = ("shape", "colour", "position", "count", "read", "field", "table", "chart", "ground")


@dataclass(frozen=True)
class Turn:
    """One question and its only right answer; also boxes of what it is read from, where that is not where the answer is
    printed, or not only: of each thing that a question counts (the thing's own, or that of the first character of a
    word, line or row), and of the bar, the point or the number that shows a chart's value."""

    task: str
    question: str
    answer: str
    evidence: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Glyph:
    """One printed non-space character, the box of its ink, and whether it begins a word, being behind a space or the
    first of what was printed at once: how wide a space looks differs too much between fonts to tell it by."""

    char: str
    box: Box
    begins: bool = False


@dataclass(frozen=True)
class Thing:
    """One drawn shape; a bar of a chart has the shape "bar"."""

    shape: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Numbered:
    """A printed or drawn piece that has a number on its page, and its box.

    Attributes:
        box: Of its ink.
        row: Of the lines that are counted, or of a table's rows below the header, from 1; 0, of none.
        place: Of the words of its line or of a sign, of a table's columns, of a chart's bars or points, or of a scene's
            things, from 1; 0, of none.
        value: That a chart shows there; 0, none.
    """

    box: Box
    row: int = 0
    place: int = 0
    value: int = 0


@dataclass(frozen=True)
class Sample:
    """One generated picture with everything that is known about it.

    `image` is RGB; every box is in its pixels. `caption` describes the picture or transcribes it in reading
    order. `numbered` are the pieces that questions name by a number, or count. `layout` holds the discrete choices of
    arrangement and `fonts` the font families, both of which the splits keep apart.
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
    """The box as the model reads and writes it: "[0.12, 0.34, 0.50, 0.60]".

    `box` is in pixels of an image of `width` x `height`; the numbers are shares of its sides, 0.00 to 0.99.
    """
    fractions = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    return "[" + ", ".join(f"{min(max(fraction, 0.0), 0.99):.2f}" for fraction in fractions) + "]"


def union(boxes: Iterable[Box]) -> Box:
    """The smallest box around `boxes`, of which there must be one at least."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def position_of(box: Box, width: float, height: float) -> str:
    """Which cell of a 3x3 grid over the picture holds the centre of `box`: one of `POSITIONS`."""
    column = min(int(3 * (box[0] + box[2]) / 2 / width), 2)
    row = min(int(3 * (box[1] + box[3]) / 2 / height), 2)
    return POSITIONS[3 * row + column]
