"""Position labels: the second word of the third line, the fourth bar, the second red object.

"How many" and "the third" ask for more than the content of one visual token: they depend on what comes before it. The
generated world knows the number of every word, letter, bar and object, so auxiliary heads can learn it for each visual
token (see `training.objectives.auxiliary_heads`). The answer to "How many words are there?" is then the number of the
last word.
"""

from collections import Counter

import torch
from torch import Tensor

from convllava.data.dense_labels import box_labels, glyph_map, object_boxes, paint, printed_words, spelling_labels
from convllava.geometry import Box, Placement, grid
from convllava.synthetic import Sample

LABEL_CELL = 16
"""Side of one cell of the maps in pixels: a visual token can hold several lines and words."""
POSITION_CLASSES = {"row": 10, "place": 10, "letter": 13, "value": 21, "of_shape": 8, "of_colour": 8}
"""Classes of each map; 0 is none, and the last class holds all larger numbers."""
BOXES = "boxes"
"""The key of the boxes of words and objects, next to the maps."""


def position_labels(
    sample: Sample, placement: Placement, stride: int, character_labels: bool = False
) -> dict[str, Tensor]:
    """Return the numbers over each cell of 16 pixels of a page, and the box of the object in each visual token.

    If several objects cover a cell, the one that was drawn last counts.

    Returns:
        row, place, value: (height / 16, width / 16), see `Numbered`.
        letter: The same shape, the number of a character in its word.
        of_shape, of_colour: The same shape, the number of an object among those of its shape and of its colour, in the
            order of drawing.
        boxes: (cells, 5), see `dense_labels.box_labels`, of words and objects.
        glyph, spelling: Only with `character_labels`; see `dense_labels.glyph_map` and `dense_labels.spelling_labels`.
    """
    words = printed_words(sample)
    numbered: list[tuple[Box, dict[str, int]]] = [
        (piece.box, {"row": piece.row, "place": piece.place, "value": value_class(piece.value)})
        for piece in sample.numbered
    ]
    # A visual token can hold both l of "Village"; only their numbers distinguish them.
    numbered += [(glyph.box, {"letter": index}) for word in words for index, glyph in enumerate(word, start=1)]
    shapes: Counter[str] = Counter()
    colours: Counter[str] = Counter()
    for thing in sample.things:
        shapes[thing.shape] += 1
        colours[thing.colour] += 1
        numbered.append((thing.box, {"of_shape": shapes[thing.shape], "of_colour": colours[thing.colour]}))
    cells = grid(placement.canvas, LABEL_CELL)
    maps = {name: torch.zeros(cells, dtype=torch.long) for name in POSITION_CLASSES}
    for box, numbers in numbered:
        for name, number in numbers.items():
            if number:
                paint(maps[name], placement.box_to_normalised(box), min(number, POSITION_CLASSES[name] - 1))
    found = {**maps, BOXES: box_labels(object_boxes(sample), placement, stride)}
    if character_labels:
        found |= {"glyph": glyph_map(sample, placement), "spelling": spelling_labels(words, placement, stride)}
    return found


def value_class(value: int) -> int:
    """Return the class of a chart's value; 0 is none. Axes can be read to a multiple of 5."""
    return max(1, round(value / 5)) if value else 0
