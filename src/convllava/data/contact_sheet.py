"""A contact sheet of samples as the model sees them.

Each sample shows its resized images with the grid of visual tokens, and its text; the supervised part is blue.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from convllava.data.collate import IGNORE, SKIPPED
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.processing import ConvLlavaProcessor

_WIDTH, _MARGIN, _LINE = 460, 16, 20
_PROMPT, _SUPERVISED, _GRID = (90, 96, 110), (20, 80, 200), (255, 0, 120, 70)
TextRun = tuple[str, bool]
"""A piece of text, and whether it is supervised."""


@dataclass(frozen=True)
class SheetSample:
    """One sample of the sheet: its title, its images with the grid, and its text."""

    title: str
    images: list[Image.Image]
    text: list[TextRun]


def sheet_sample(item: dict[str, Any], processor: ConvLlavaProcessor, stride: int, number: int) -> SheetSample:
    """Prepare an item of any dataset for the sheet.

    Args:
        item: `pixel_values` of shape (images, 3, height, width) with `image_sizes`, or of shape (3, height, width);
            `input_ids` and `labels` if it has text.
        processor: The processor that encoded the item.
        stride: Pixels of a grid cell's side.
        number: Number of the sample in its title.
    """
    pixels: list[Tensor] = [item["pixel_values"]] if "pixel_values" in item else []
    if "image_sizes" in item:
        sizes = zip(item["pixel_values"], item["image_sizes"].tolist(), strict=True)
        pixels = [values[:, :height, :width] for values, (height, width) in sizes]
    images: list[Image.Image] = []
    for values in pixels:
        image = picture_of(values, processor.image_processor)
        scale = min(1.0, (_WIDTH - 2 * _MARGIN) / image.width, 460 / image.height)
        width, height = (max(1, round(side * scale)) for side in image.size)
        images.append(image.resize((width, height), Image.Resampling.LANCZOS))
        draw = ImageDraw.Draw(images[-1], "RGBA")
        for x in range(stride, image.width, stride):
            draw.line((x * scale, 0, x * scale, height), fill=_GRID)
        for y in range(stride, image.height, stride):
            draw.line((0, y * scale, width, y * scale), fill=_GRID)
    if "input_ids" not in item:
        return SheetSample(f"sample {number}: labels of cells", images, [])
    ids, supervised = item["input_ids"], item["labels"] != IGNORE
    visual = int((ids == processor.image_token_id).sum())
    title = f"sample {number}: {len(ids)} tokens, {visual} visual, {int(supervised.sum())} supervised"
    title += f" ({len(item[SKIPPED])} bad before it)" if SKIPPED in item else ""
    # Pieces of text that are supervised or not; visual tokens are written as their number.
    kind = 2 * (ids == processor.image_token_id).long() + supervised.long()
    text: list[TextRun] = []
    for stretch in torch.tensor_split(torch.arange(len(ids)), (kind.diff() != 0).nonzero()[:, 0] + 1):
        if int(kind[stretch[0]]) >= 2:
            text.append((f"[{len(stretch)} visual tokens]", False))
        else:
            text.append((processor.tokenizer.decode(ids[stretch]), bool(supervised[stretch[0]])))
    return SheetSample(title, images, text)


def picture_of(pixels: Tensor, processor: ConvLlavaImageProcessorPil) -> Image.Image:
    """Turn normalised pixels of shape (3, height, width) back into the 8-bit image."""
    values = pixels.numpy().transpose(1, 2, 0)
    if processor.do_normalize:
        values = values * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    if processor.do_rescale:
        values = values / processor.rescale_factor
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def draw_sheet(samples: Sequence[SheetSample]) -> Image.Image:
    """Draw the samples in columns. Each one goes to the column that is shortest so far."""
    font = ImageFont.load_default(15)
    panels = []
    for sample in samples:
        lines = list(_wrapped(sample.text, font))
        if len(lines) > 18:
            lines = [*lines[:18], [("...", False)]]
        height = 2 * _MARGIN + (1 + len(lines)) * _LINE + sum(image.height + _MARGIN for image in sample.images)
        panel = Image.new("RGB", (_WIDTH, height), "white")
        draw = ImageDraw.Draw(panel)
        draw.text((_MARGIN, _MARGIN), sample.title, fill="black", font=font)
        top = _MARGIN + _LINE + _MARGIN // 2
        for image in sample.images:
            panel.paste(image, (_MARGIN, top))
            top += image.height + _MARGIN
        for number, line in enumerate(lines):
            left = float(_MARGIN)
            for text, supervised in line:
                colour = _SUPERVISED if supervised else _PROMPT
                draw.text((left, top + number * _LINE), text, fill=colour, font=font)
                left += font.getlength(text)
        panels.append(panel)
    tops = [_MARGIN] * max(1, min(len(panels), round(len(panels) ** 0.5 + 0.5)))
    places = []
    for panel in panels:
        column = tops.index(min(tops))
        places.append((_MARGIN + column * (_WIDTH + _MARGIN), tops[column]))
        tops[column] += panel.height + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + len(tops) * (_WIDTH + _MARGIN), max(tops)), (225, 228, 234))
    for panel, place in zip(panels, places, strict=True):
        sheet.paste(panel, place)
    return sheet


def _wrapped(runs: Sequence[TextRun], font: Any) -> Iterator[list[TextRun]]:
    """Yield lines that are not wider than a panel. Words that are wider are broken."""
    line: list[TextRun] = []
    width = 0.0
    for text, supervised in runs:
        for number, row in enumerate(text.split("\n")):
            words = [f"{word} " for word in row.split(" ")]
            # A very long word is broken into parts.
            parts = [word[start : start + 40] for word in words for start in range(0, len(word), 40)]
            for part in ["\n", *parts] if number else parts:
                length = font.getlength(part)
                if line and (part == "\n" or width + length > _WIDTH - 2 * _MARGIN):
                    yield line
                    line, width = [], 0.0
                if part != "\n":
                    line.append((part, supervised))
                    width += length
    if line:
        yield line
