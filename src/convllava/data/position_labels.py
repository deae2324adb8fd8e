"""What the pieces of a page are numbers of: the second word of the third line, the fourth bar, the second red thing.

"How many" and "the third" ask for more than what stands in a visual token: for what stands before it. The generated
world knows it of every piece, so a token can be asked for it (see `training.marks`); that a sign has four words is then
what its last word says of itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from convllava.data.dense_labels import Word, boxes, glyph_map, paint, pieces, spelling, words
from convllava.geometry import Box, Placement, grid
from convllava.synthetic import Numbered, Sample

MARK_CELL = 16
"""Side in pixels of one cell of the maps: lines and words that share a visual token are told apart."""
_VALUE_STEP = 5
"""Values of charts are told to the nearest multiple of this, as their axes let them be read."""
MARK_CLASSES = {"row": 10, "place": 10, "letter": 13, "value": 21, "of_shape": 8, "of_colour": 8}
"""Classes of each map, 0 being none; larger numbers are told as the last class."""
BOXES = "boxes"
"""What the boxes of a page's words and things are called beside its maps."""


def marks(sample: Sample, placement: Placement, stride: int, letters: bool = False) -> dict[str, Tensor]:
    """The numbers over each cell of 16 pixels of a sample on its canvas, and the box of what stands in a visual token.

    Of several pieces over one cell, the last that was printed or drawn.

    Returns:
        row, place, value (height / 16, width / 16), see `Numbered`; letter, the number of a character in its word;
        of_shape and of_colour, which of the things of its shape and of its colour a thing is, in the order drawn.
        boxes: (cells, 5) as of `cells.boxes`, of words and things. With `letters` also glyph (height / 8, width / 8),
        the character over each cell of 8 pixels, and spelling, as of `cells.spelling`.
    """
    fine = grid(placement.canvas, MARK_CELL)
    maps = {name: torch.zeros(fine, dtype=torch.long) for name in MARK_CLASSES}
    printed = words(sample)
    for box, numbers in (*_numbers(sample.numbered), *_letters(printed), *_counts(sample)):
        for name, number in numbers.items():
            if number:
                paint(maps[name], placement.box_to_normalised(box), min(number, MARK_CLASSES[name] - 1))
    found = {**maps, BOXES: boxes(pieces(sample), placement, stride)}
    if letters:
        found |= {"glyph": glyph_map(sample, placement), "spelling": spelling(printed, placement, stride)}
    return found


def _numbers(pieces: Sequence[Numbered]) -> list[tuple[Box, dict[str, int]]]:
    return [(piece.box, {"row": piece.row, "place": piece.place, "value": step_of(piece.value)}) for piece in pieces]


def _letters(printed: Sequence[Word]) -> list[tuple[Box, dict[str, int]]]:
    """The number of each character in its word: where one visual token holds both l of "Village", the one tells from
    the other by nothing else."""
    return [(glyph.box, {"letter": number}) for word in printed for number, glyph in enumerate(word, start=1)]


def step_of(value: int) -> int:
    """The class of a chart's value; 0, none."""
    return max(1, round(value / _VALUE_STEP)) if value else 0


def _counts(sample: Sample) -> list[tuple[Box, dict[str, int]]]:
    """For each thing how many of its shape and of its colour there are so far."""
    shapes: Counter[str] = Counter()
    colours: Counter[str] = Counter()
    found = []
    for thing in sample.things:
        shapes[thing.shape] += 1
        colours[thing.colour] += 1
        found.append((thing.box, {"of_shape": shapes[thing.shape], "of_colour": colours[thing.colour]}))
    return found
