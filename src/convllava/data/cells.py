"""The generated world cell by cell: what stands where, for the objectives that come before conversation."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convllava.geometry import Box, Placement, Size, cells_under, centre_cell, grid
from convllava.processing import ConvLlavaProcessor
from convllava.synthetic import CHARACTERS, COLOURS, SHAPES, Glyph, Sample, World

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
ACCURACIES = (*DENSE_CLASSES, "spelling")
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
    """As `DenseDataset`, with `spelling`: what each printed character follows, and in which cell it stands."""

    def item(self, sample: Sample) -> dict[str, Tensor]:
        """As of `DenseDataset`, and the spelling."""
        return super().item(sample) | {"spelling": spelling(sample, self.placement(sample), self.stride)}


def spelling(sample: Sample, placement: Placement, stride: int) -> Tensor:
    """(characters, 3): the cell of each printed character that is seen, row by row; the glyph class before it in its
    word, 0 where it begins one; its own."""
    cells = grid(placement.canvas, stride)
    rows = []
    before: Glyph | None = None
    for glyph in sample.glyphs:
        box = placement.box_to_normalised(glyph.box)
        if cells_under(box, cells):
            row, column = centre_cell(box, cells)
            follows = before is not None and _is_next(before, glyph)
            rows.append((row * cells.width + column, _label(before) if before and follows else 0, _label(glyph)))
        before = glyph
    return torch.tensor(rows, dtype=torch.long).view(-1, 3)


def _is_next(a: Glyph, b: Glyph) -> bool:
    """Whether b stands on the line of a, right of it and with less than a space between."""
    height = max(a.box[3] - a.box[1], b.box[3] - b.box[1])
    level = abs(a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2 < height
    return level and -height / 2 < b.box[0] - a.box[2] < 0.3 * height


def _label(glyph: Glyph) -> int:
    return _LABELS["glyph"][glyph.char]


def label_maps(sample: Sample, placement: Placement, stride: int) -> dict[str, Tensor]:
    """Label maps of a sample on its canvas; see `DenseDataset`."""
    fine, coarse = grid(placement.canvas, GLYPH_CELL), grid(placement.canvas, stride)
    maps = {name: torch.zeros(fine if name == "glyph" else coarse, dtype=torch.long) for name in DENSE_NAMES}
    for glyph in sample.glyphs:
        _paint(maps["glyph"], placement.box_to_normalised(glyph.box), _label(glyph))
    for thing in sample.things:
        box = placement.box_to_normalised(thing.box)
        _paint(maps["shape"], box, _LABELS["shape"][thing.shape])
        _paint(maps["colour"], box, _LABELS["colour"][thing.colour])
    return maps


def _paint(labels: Tensor, box: Box, value: int) -> None:
    for row, column in cells_under(box, Size(*labels.shape)):
        labels[row, column] = value


def collate_dense(items: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Unequal shapes stay lists."""
    return {key: [item[key] for item in items] for key in items[0]}
