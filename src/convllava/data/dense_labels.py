"""Dense labels: the character, shape and colour in each cell of a generated page, for training before conversation."""

import math
import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
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
"""The text of each class of the label maps: words have a leading space, characters have none."""
DENSE_CLASSES = {name: len(names) + 1 for name, names in DENSE_NAMES.items()}
"""Number of classes of each label map; class 0 is nothing."""
DENSE_METRICS = (*DENSE_CLASSES, "spelling", "box_error")
"""Metrics that dense pretraining and alignment report: accuracies, and the mean error of boxes."""
_LABELS = {
    name: {text.strip(): label for label, text in enumerate(names, start=1)} for name, names in DENSE_NAMES.items()
}


@dataclass(eq=False, repr=False)
class DenseDataset(Dataset):
    """Generated pages as pixels and label maps.

    Items have `pixel_values` (3, height, width); `glyph` (height / 8, width / 8), the character over each cell of 8
    pixels; `shape` and `colour` (height / stride, width / stride), the object over each cell of the tower's grid.

    Args:
        world: The source of the pages.
        processor: The image processor gives pixels and sizes.
        length: Number of samples.
        sheets: Share of glyph sheets.
        stride: The tower's stride; a tower of four stages has 32.
    """

    world: World
    processor: ConvLlavaProcessor
    length: int
    _: KW_ONLY
    sheets: float = 1.0
    stride: int = 32

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        is_sheet = random.Random(index).random() < self.sheets
        return self.item(self.world.glyph_sheet(index) if is_sheet else self.world.sample(index))

    def item(self, sample: Sample) -> dict[str, Tensor]:
        """Return the pixels and the labels of one sample."""
        pixels = self.processor.image_processor(sample.image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels} | label_maps(sample, self.placement(sample), self.stride)

    def placement(self, sample: Sample) -> Placement:
        """Return how the image processor places the sample's image on its canvas."""
        return self.processor.image_processor.placement(Size(sample.image.height, sample.image.width))


class AlignmentDataset(DenseDataset):
    """`DenseDataset` with labels of single visual tokens.

    Items also have `spelling` (see `spelling_labels`), `words` (see `word_token_labels`) and `boxes` (see
    `box_labels`).
    """

    def item(self, sample: Sample) -> dict[str, Tensor]:
        """Return the pixels and the labels of one sample."""
        placement = self.placement(sample)
        printed = printed_words(sample)
        return super().item(sample) | {
            "spelling": spelling_labels(printed, placement, self.stride),
            "words": word_token_labels(printed, placement, self.stride, self.processor.tokenizer),
            "boxes": box_labels(object_boxes(sample), placement, self.stride),
        }


Word = list[Glyph]


def printed_words(sample: Sample) -> list[Word]:
    """Return the printed words, each as its characters."""
    found: list[Word] = []
    for glyph in sample.glyphs:
        if glyph.begins or not found:
            found.append([])
        found[-1].append(glyph)
    return found


def word_text(word: Word) -> str:
    """Return the text of a word without the punctuation around it."""
    return "".join(glyph.char for glyph in word).strip(".,:;()")


def spelling_labels(printed: Sequence[Word], placement: Placement, stride: int) -> Tensor:
    """Return (characters, 4): the cell of each visible character, the glyph classes of the two characters before it in
    its word, and its own class.

    Class 0 marks the start of a word. It also follows the last character of a word, in the cell of that character.
    """
    cells = grid(placement.canvas, stride)
    rows = []
    for word in printed:
        labels = [0, 0, *(_LABELS["glyph"][glyph.char] for glyph in word), 0]
        for number, glyph in enumerate([*word, word[-1]]):
            box = placement.box_to_normalised(glyph.box)
            if cells_under(box, cells):
                row, column = centre_cell(box, cells)
                rows.append((row * cells.width + column, *labels[number : number + 3]))
    return torch.tensor(rows, dtype=torch.long).view(-1, 4)


def word_token_labels(printed: Sequence[Word], placement: Placement, stride: int, tokenizer: Any) -> Tensor:
    """Return (names, 2): a cell, and the token of a printed word in it, as printed or in lower case.

    Words of several tokens are left out.
    """
    cells = grid(placement.canvas, stride)
    rows = set()
    for word in printed:
        text = word_text(word)
        for form in {text, text.lower()} if len(text) > 1 else ():
            ids = tokenizer(f" {form}").input_ids
            if len(ids) == 1:
                under = set().union(*(cells_under(placement.box_to_normalised(glyph.box), cells) for glyph in word))
                rows |= {(row * cells.width + column, ids[0]) for row, column in under}
    return torch.tensor(sorted(rows), dtype=torch.long).view(-1, 2)


def object_boxes(sample: Sample) -> list[Box]:
    """Return the boxes of the printed words and of the drawn objects, in pixels of the image."""
    words = [union(glyph.box for glyph in word) for word in printed_words(sample)]
    return words + [thing.box for thing in sample.things]


def box_labels(boxes: Sequence[Box], placement: Placement, stride: int) -> Tensor:
    """Return (cells, 5): an occupied cell, and the distances from its centre to the left, top, right and bottom side of
    the box over it, in cells.

    If several boxes cover a cell, the one with the nearest centre counts.
    """
    cells = grid(placement.canvas, stride)
    nearest: dict[tuple[int, int], tuple[float, ...]] = {}
    for box in map(placement.box_to_normalised, boxes):
        x0, y0, x1, y1 = box[0] * cells.width, box[1] * cells.height, box[2] * cells.width, box[3] * cells.height
        for row, column in cells_under(box, cells):
            sides = (x0 - column - 0.5, y0 - row - 0.5, x1 - column - 0.5, y1 - row - 0.5)
            distance = (sides[0] + sides[2]) ** 2 + (sides[1] + sides[3]) ** 2
            if distance < nearest.get((row, column), (math.inf,))[0]:
                nearest[row, column] = (distance, *sides)
    rows = [(row * cells.width + column, *sides) for (row, column), (_, *sides) in sorted(nearest.items())]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 5)


def label_maps(sample: Sample, placement: Placement, stride: int) -> dict[str, Tensor]:
    """Return the label maps of a sample on its canvas; see `DenseDataset`."""
    coarse = grid(placement.canvas, stride)
    maps = {name: torch.zeros(coarse, dtype=torch.long) for name in ("shape", "colour")}
    for thing in sample.things:
        box = placement.box_to_normalised(thing.box)
        paint(maps["shape"], box, _LABELS["shape"][thing.shape])
        paint(maps["colour"], box, _LABELS["colour"][thing.colour])
    return {"glyph": glyph_map(sample, placement), **maps}


def glyph_map(sample: Sample, placement: Placement) -> Tensor:
    """Return (height / 8, width / 8): the character over each cell of 8 pixels of the canvas; 0 is none."""
    labels = torch.zeros(grid(placement.canvas, GLYPH_CELL), dtype=torch.long)
    for glyph in sample.glyphs:
        paint(labels, placement.box_to_normalised(glyph.box), _LABELS["glyph"][glyph.char])
    return labels


def paint(labels: Tensor, box: Box, value: int) -> None:
    """Write a label into the cells of a map under a box, which is given in fractions of the canvas."""
    if under := cells_under(box, Size(*labels.shape)):
        rows, columns = zip(*under, strict=True)
        labels[list(rows), list(columns)] = value  # writing cell by cell took a fifth of the time of a page


def collate_dense(items: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Return a batch; images and maps have unequal shapes, so each key holds a list."""
    return {key: [item[key] for item in items] for key in items[0]}
