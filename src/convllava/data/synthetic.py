"""The generated world as datasets: chat sequences for the language model, label maps for dense pre-training."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convllava.data.conversation import CAPTION_REQUESTS, encode
from convllava.data.guidance import CAPTION, guides
from convllava.geometry import Box, Size
from convllava.processing import ConvLlavaProcessor
from convllava.synthetic import CHARACTERS, COLOURS, SHAPES, Glyph, Sample, Turn, World

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


class ChatDataset(Dataset):
    """Sample i of a world as a supervised conversation: its turns, and in a share of samples the caption among them.

    Items are those of `conversation.encode`; with `guided`, also `guides` (see `guidance`).
    """

    def __init__(
        self,
        world: World,
        processor: ConvLlavaProcessor,
        length: int,
        *,
        captions: float = 1.0,
        images: bool = True,
        guided: bool = False,
    ) -> None:
        self.world, self.processor, self.length = world, processor, length
        self.captions, self.images, self.guided = captions, images, guided

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.world.sample(index)
        turns = self.turns(sample)
        item = encode(self.processor, self.messages(sample, turns))
        return item | {"guides": guides(item, turns, sample, self.processor)} if self.guided else item

    def turns(self, sample: Sample) -> list[Turn]:
        """The sample's turns, and perhaps its caption at any place among them."""
        draw = random.Random(sample.index)
        turns = list(sample.turns)
        if not turns or draw.random() < self.captions:
            place = draw.randrange(len(turns) + 1)
            turns.insert(place, Turn(CAPTION, draw.choice(CAPTION_REQUESTS), sample.caption))
        return turns

    def messages(self, sample: Sample, turns: list[Turn]) -> list[dict[str, Any]]:
        """The conversation for the chat template; its image is the first part of the first user message."""
        messages: list[dict[str, Any]] = []
        for turn in turns:
            messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        if self.images:
            messages[0]["content"].insert(0, {"type": "image", "image": sample.image})
        return messages


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
        sample = self._sample(index)
        pixels = self.processor.image_processor(sample.image, return_tensors="pt")
        height, width = pixels["image_sizes"][0].tolist()
        return {"pixel_values": pixels["pixel_values"][0]} | dense_labels(sample, height, width, self.stride)

    def _sample(self, index: int) -> Sample:
        is_sheet = random.Random(index).random() < self.sheets
        return self.world.glyph_sheet(index) if is_sheet else self.world.sample(index)


class AlignDataset(DenseDataset):
    """As `DenseDataset`, with `spelling`: what each printed character follows, and in which cell it stands."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        grid = Size(*item["shape"].shape)
        return item | {"spelling": spelling(self._sample(index), grid)}


def spelling(sample: Sample, grid: Size) -> Tensor:
    """(characters, 3): the cell of each printed character, row by row; the glyph class before it in its word, 0 where
    it begins one; its own."""
    rows = []
    before: Glyph | None = None
    for glyph in sample.glyphs:
        (x, y), (width, height) = _centre(glyph.box), sample.image.size
        row = min(int(y / height * grid.height), grid.height - 1)
        column = min(int(x / width * grid.width), grid.width - 1)
        follows = before is not None and _is_next(before, glyph)
        rows.append((row * grid.width + column, _label(before) if before and follows else 0, _label(glyph)))
        before = glyph
    return torch.tensor(rows, dtype=torch.long).view(-1, 3)


def _is_next(a: Glyph, b: Glyph) -> bool:
    """Whether b stands on the line of a, right of it and with less than a space between."""
    height = max(a.box[3] - a.box[1], b.box[3] - b.box[1])
    level = abs(_centre(a.box)[1] - _centre(b.box)[1]) < height
    return level and -height / 2 < b.box[0] - a.box[2] < 0.3 * height


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _label(glyph: Glyph) -> int:
    return _LABELS["glyph"][glyph.char]


def dense_labels(sample: Sample, height: int, width: int, stride: int) -> dict[str, Tensor]:
    """Label maps of a sample whose image was resized to height x width; see `DenseDataset`."""
    scale = (width / sample.image.width, height / sample.image.height)
    glyph = np.zeros((height // GLYPH_CELL, width // GLYPH_CELL), dtype=np.int64)
    for item in sample.glyphs:
        _paint(glyph, item.box, scale, GLYPH_CELL, _LABELS["glyph"][item.char])
    shape = np.zeros((height // stride, width // stride), dtype=np.int64)
    colour = np.zeros_like(shape)
    for thing in sample.things:
        _paint(shape, thing.box, scale, stride, _LABELS["shape"][thing.shape])
        _paint(colour, thing.box, scale, stride, _LABELS["colour"][thing.colour])
    return {name: torch.from_numpy(labels) for name, labels in (("glyph", glyph), ("shape", shape), ("colour", colour))}


def _paint(labels: np.ndarray, box: tuple[float, ...], scale: tuple[float, float], cell: int, value: int) -> None:
    """Mark the cells whose centres the box covers, and always the cell of its own centre: thin letters miss centres."""
    x0, x1 = (x * scale[0] / cell for x in (box[0], box[2]))
    y0, y1 = (y * scale[1] / cell for y in (box[1], box[3]))
    rows = slice(max(0, round(y0)), max(0, round(y1)))
    columns = slice(max(0, round(x0)), max(0, round(x1)))
    labels[rows, columns] = value
    row, column = int((y0 + y1) / 2), int((x0 + x1) / 2)
    if 0 <= row < labels.shape[0] and 0 <= column < labels.shape[1]:
        labels[row, column] = value


def collate_dense(items: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Unequal shapes stay lists."""
    return {key: [item[key] for item in items] for key in items[0]}
