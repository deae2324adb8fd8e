"""The generated world cell by cell: what stands where, for the objectives that come before conversation."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convllava.geometry import Box, Size
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
        pixels = self.processor.image_processor(sample.image, return_tensors="pt")
        size = Size(*pixels["image_sizes"][0].tolist())
        return {"pixel_values": pixels["pixel_values"][0]} | label_maps(sample, size, self.stride)


class AlignDataset(DenseDataset):
    """As `DenseDataset`, with `spelling`: what each printed character follows, and in which cell it stands."""

    def item(self, sample: Sample) -> dict[str, Tensor]:
        item = super().item(sample)
        return item | {"spelling": spelling(sample, Size(*item["shape"].shape))}


def spelling(sample: Sample, grid: Size) -> Tensor:
    """(characters, 3): the cell of each printed character, row by row; the glyph class before it in its word, 0 where
    it begins one; its own."""
    rows = []
    before: Glyph | None = None
    for glyph in sample.glyphs:
        row, column = cell_at(glyph.box, sample, grid)
        follows = before is not None and _is_next(before, glyph)
        rows.append((row * grid.width + column, _label(before) if before and follows else 0, _label(glyph)))
        before = glyph
    return torch.tensor(rows, dtype=torch.long).view(-1, 3)


def _is_next(a: Glyph, b: Glyph) -> bool:
    """Whether b stands on the line of a, right of it and with less than a space between."""
    height = max(a.box[3] - a.box[1], b.box[3] - b.box[1])
    level = abs(a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2 < height
    return level and -height / 2 < b.box[0] - a.box[2] < 0.3 * height


def _label(glyph: Glyph) -> int:
    return _LABELS["glyph"][glyph.char]


def label_maps(sample: Sample, size: Size, stride: int) -> dict[str, Tensor]:
    """Label maps of a sample whose image was resized to `size`; see `DenseDataset`."""
    fine = Size(size.height // GLYPH_CELL, size.width // GLYPH_CELL)
    coarse = Size(size.height // stride, size.width // stride)
    maps = {name: torch.zeros(fine if name == "glyph" else coarse, dtype=torch.long) for name in DENSE_NAMES}
    for glyph in sample.glyphs:
        _paint(maps["glyph"], sample, glyph.box, _label(glyph))
    for thing in sample.things:
        _paint(maps["shape"], sample, thing.box, _LABELS["shape"][thing.shape])
        _paint(maps["colour"], sample, thing.box, _LABELS["colour"][thing.colour])
    return maps


def _paint(labels: Tensor, sample: Sample, box: Box, value: int) -> None:
    for row, column in cells_under(box, sample, Size(*labels.shape)):
        labels[row, column] = value


def cells_under(box: Box, sample: Sample, grid: Size) -> set[tuple[int, int]]:
    """The cells (row, column) of a grid over the sample's image whose centres the box covers, and always the cell of
    its own centre: thin letters miss centres."""
    x0, y0, x1, y1 = _on_grid(box, sample, grid)
    rows = range(max(0, round(y0)), min(grid.height, round(y1)))
    columns = range(max(0, round(x0)), min(grid.width, round(x1)))
    return {(row, column) for row in rows for column in columns} | {cell_at(box, sample, grid)}


def cell_at(box: Box, sample: Sample, grid: Size) -> tuple[int, int]:
    """The cell (row, column) of the box's centre."""
    x0, y0, x1, y1 = _on_grid(box, sample, grid)
    row, column = int((y0 + y1) / 2), int((x0 + x1) / 2)
    return min(max(row, 0), grid.height - 1), min(max(column, 0), grid.width - 1)


def _on_grid(box: Box, sample: Sample, grid: Size) -> Box:
    """The box in units of cells."""
    across, down = grid.width / sample.image.width, grid.height / sample.image.height
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def collate_dense(items: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Unequal shapes stay lists."""
    return {key: [item[key] for item in items] for key in items[0]}
