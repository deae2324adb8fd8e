"""The generated world cell by cell: what stands where, for the objectives that come before conversation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convllava.geometry import Box, Placement, Size, cells_under, centre_cell, grid
from convllava.model.processing import ConvLlavaProcessor
from convllava.synthetic import CHARACTERS, COLOURS, SHAPES, Glyph, Sample, World, union

GLYPH_CELL = 8
"""Side in pixels of one cell of the glyph map: about the width of the smallest printed character."""
DENSE_NAMES = {
    "glyph": tuple(CHARACTERS),
    "shape": tuple(f" {shape}" for shape in (*SHAPES, "bar")),
    "colour": tuple(f" {colour}" for colour in COLOURS),
}
"""What the classes of each label map are called in an answer: words after a space, characters spelled."""
DENSE_CLASSES = {name: len(names) + 1 for name, names in DENSE_NAMES.items()}
"""Classes of each label map, 0 being nothing."""
ACCURACIES = (*DENSE_CLASSES, "spelling", "box_error")
"""What training on labels of cells reports of itself."""
_LABELS = {
    name: {text.strip(): label for label, text in enumerate(names, start=1)} for name, names in DENSE_NAMES.items()
}


class DenseDataset(Dataset):
    """Sample i as pixels and label maps of what stands where.

    Items: pixel_values (3, height, width); glyph (height/8, width/8), the character over each 8-pixel cell; shape and
    colour (height/stride, width/stride), the object over each cell of the tower's grid, of four stages by default.
    """

    def __init__(
        self, world: World, processor: ConvLlavaProcessor, length: int, *, sheets: float = 1.0, stride: int = 32
    ) -> None:
        self.world, self.processor, self.length = world, processor, length
        self.sheets, self.stride = sheets, stride

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        is_sheet = random.Random(index).random() < self.sheets
        return self.item(self.world.glyph_sheet(index) if is_sheet else self.world.sample(index))

    def item(self, sample: Sample) -> dict[str, Tensor]:
        """The pixels and the labels of one sample."""
        pixels = self.processor.image_processor(sample.image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels} | label_maps(sample, self.placement(sample), self.stride)

    def placement(self, sample: Sample) -> Placement:
        """How the image processor lays the sample's image on its canvas."""
        return self.processor.image_processor.placement(Size(sample.image.height, sample.image.width))


class AlignDataset(DenseDataset):
    """As `DenseDataset`, with what single visual tokens hold: `spelling`, `words` and `boxes`, see there."""

    def item(self, sample: Sample) -> dict[str, Tensor]:
        """As of `DenseDataset`, and spelling, words and boxes."""
        placement = self.placement(sample)
        printed = words(sample)
        return super().item(sample) | {
            "spelling": spelling(printed, placement, self.stride),
            "words": word_tokens(printed, placement, self.stride, self.processor.tokenizer),
            "boxes": boxes(pieces(sample), placement, self.stride),
        }


Word = list[Glyph]


def words(sample: Sample) -> list[Word]:
    """The printed words, each as its characters."""
    found: list[Word] = []
    for glyph in sample.glyphs:
        if glyph.begins or not found:
            found.append([])
        found[-1].append(glyph)
    return found


def text_of(word: Word) -> str:
    """What a word says, without the punctuation around it."""
    return "".join(glyph.char for glyph in word).strip(".,:;()")


def spelling(printed: Sequence[Word], placement: Placement, stride: int) -> Tensor:
    """(characters, 4): the cell of each character that is seen, the glyph classes of the two before it in its word,
    its own. 0 stands before a word, and as what follows its last character, in that one's cell."""
    cells = grid(placement.canvas, stride)
    rows = []
    for word in printed:
        labels = [0, 0, *map(_label, word), 0]
        for number, glyph in enumerate([*word, word[-1]]):
            box = placement.box_to_normalised(glyph.box)
            if cells_under(box, cells):
                row, column = centre_cell(box, cells)
                rows.append((row * cells.width + column, *labels[number : number + 3]))
    return torch.tensor(rows, dtype=torch.long).view(-1, 4)


def word_tokens(printed: Sequence[Word], placement: Placement, stride: int, tokenizer: Any) -> Tensor:
    """(names, 2): a cell, and a token that names a printed word in it, as it is printed or in lower case; none for
    words that the tokenizer spells."""
    cells = grid(placement.canvas, stride)
    rows = set()
    for word in printed:
        text = text_of(word)
        for form in {text, text.lower()} if len(text) > 1 else ():
            ids = tokenizer(f" {form}").input_ids
            if len(ids) == 1:
                under = set().union(*(cells_under(placement.box_to_normalised(glyph.box), cells) for glyph in word))
                rows |= {(row * cells.width + column, ids[0]) for row, column in under}
    return torch.tensor(sorted(rows), dtype=torch.long).view(-1, 2)


def pieces(sample: Sample) -> list[Box]:
    """The boxes of the printed words and of the things, in pixels of the image."""
    return [union(glyph.box for glyph in word) for word in words(sample)] + [thing.box for thing in sample.things]


def boxes(found: Sequence[Box], placement: Placement, stride: int) -> Tensor:
    """(cells, 5): an occupied cell, and how far left, up, right and down from its centre the sides of what stands in
    it lie, in cells; of several things that with the nearest centre."""
    cells = grid(placement.canvas, stride)
    nearest: dict[tuple[int, int], tuple[float, ...]] = {}
    for box in map(placement.box_to_normalised, found):
        x0, y0, x1, y1 = box[0] * cells.width, box[1] * cells.height, box[2] * cells.width, box[3] * cells.height
        for row, column in cells_under(box, cells):
            sides = (x0 - column - 0.5, y0 - row - 0.5, x1 - column - 0.5, y1 - row - 0.5)
            distance = (sides[0] + sides[2]) ** 2 + (sides[1] + sides[3]) ** 2
            if distance < nearest.get((row, column), (math.inf,))[0]:
                nearest[row, column] = (distance, *sides)
    rows = [(row * cells.width + column, *sides) for (row, column), (_, *sides) in sorted(nearest.items())]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 5)


def _label(glyph: Glyph) -> int:
    return _LABELS["glyph"][glyph.char]


def label_maps(sample: Sample, placement: Placement, stride: int) -> dict[str, Tensor]:
    """Label maps of a sample on its canvas; see `DenseDataset`."""
    coarse = grid(placement.canvas, stride)
    maps = {name: torch.zeros(coarse, dtype=torch.long) for name in ("shape", "colour")}
    for thing in sample.things:
        box = placement.box_to_normalised(thing.box)
        paint(maps["shape"], box, _LABELS["shape"][thing.shape])
        paint(maps["colour"], box, _LABELS["colour"][thing.colour])
    return {"glyph": glyph_map(sample, placement), **maps}


def glyph_map(sample: Sample, placement: Placement) -> Tensor:
    """(height / 8, width / 8): the character over each cell of 8 pixels of the canvas, 0 where there is none."""
    labels = torch.zeros(grid(placement.canvas, GLYPH_CELL), dtype=torch.long)
    for glyph in sample.glyphs:
        paint(labels, placement.box_to_normalised(glyph.box), _label(glyph))
    return labels


def paint(labels: Tensor, box: Box, value: int) -> None:
    """Give the cells of a map that lie under a box in fractions of the canvas a label."""
    if under := cells_under(box, Size(*labels.shape)):
        rows, columns = zip(*under, strict=True)
        labels[list(rows), list(columns)] = value  # at once: writing cell by cell was a fifth of a page's cost


def collate_dense(items: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Unequal shapes stay lists."""
    return {key: [item[key] for item in items] for key in items[0]}
