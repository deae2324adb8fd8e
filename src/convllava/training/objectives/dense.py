"""Dense pretraining: the substitute for CLIP if there is no pretrained ConvNeXt.

The first four stages learn what is in each cell of a page: the character over each cell of 8 pixels, predicted from the
feature maps of stages 2, 3 and 4 (strides 8, 16 and 32, so that one feature of stage 4 predicts sixteen cells), and the
shape and colour of the object over each cell of the last grid. Labels of single cells teach a small tower in minutes
what captions of whole images do not. Every stage predicts characters, so the early stages learn before the late ones
can use them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convllava.data.dense_labels import DENSE_CLASSES, GLYPH_CELL
from convllava.errors import ConfigError
from convllava.model.vision_tower import ConvLlavaVisionModel

STAGES = 4
_CHARACTER_STAGES = (2, 3, 4)
_PATCH = 4
"""The patch size in pixels for which the stages have the strides of the labels."""
_BACKGROUND_WEIGHT = 0.03
"""Loss weight of empty cells: most cells are empty, and at full weight they dominate."""


class DensePretraining(nn.Module):
    """The four-stage tower with linear heads, which are discarded after training.

    Raises:
        ConfigError: if the patch size of the tower does not fit the labels.
    """

    def __init__(self, vision_tower: ConvLlavaVisionModel) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        widths = vision_tower.config.hidden_sizes
        patch = vision_tower.config.patch_size
        if patch != _PATCH:
            raise ConfigError(
                f"objective dense labels cells of 8 pixels, for a patch_size of {_PATCH}; the tower's is {patch}"
            )
        self.sides = {stage: patch * 2 ** (stage - 1) // GLYPH_CELL for stage in _CHARACTER_STAGES}
        self.head = nn.ModuleDict()
        for stage, side in self.sides.items():
            self.head[f"norm{stage}"] = nn.LayerNorm(widths[stage - 1])
            self.head[f"glyph{stage}"] = nn.Linear(widths[stage - 1], side**2 * DENSE_CLASSES["glyph"])
        for name in ("shape", "colour"):
            self.head[name] = nn.Linear(widths[STAGES - 1], DENSE_CLASSES[name])

    def forward(
        self, pixel_values: list[Tensor], glyph: list[Tensor], shape: list[Tensor], colour: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return the loss, and per label map the accuracy of the last stage over occupied cells.

        Args:
            pixel_values: Images of (3, height, width).
            glyph: Label maps of `DenseDataset`, one per image.
            shape: As `glyph`.
            colour: As `glyph`.
        """
        outputs: dict[str, Tensor] = {}
        losses = []
        pixels, grids = self.vision_tower.embeddings(pixel_values)
        for number, stage in enumerate(self.vision_tower.encoder.stages[:STAGES], start=1):
            pixels, grids = stage(pixels, grids)
            if number in self.sides:
                features = self.head[f"norm{number}"](pixels)
                labels = torch.cat([flatten_cells(item, self.sides[number]) for item in glyph])
                logits = self.head[f"glyph{number}"](features)
                losses.append(label_map_loss("glyph", logits, labels, outputs, DENSE_CLASSES["glyph"]))
        for name, maps in (("shape", shape), ("colour", colour)):
            labels = torch.cat([item.flatten() for item in maps])
            losses.append(label_map_loss(name, self.head[name](features), labels, outputs, DENSE_CLASSES[name]))
        return {"loss": torch.stack(losses).sum(), **outputs}


def flatten_cells(labels: Tensor, side: int) -> Tensor:
    """Flatten a (height, width) label map so that the side x side cells under each feature are next to each other."""
    height, width = labels.shape
    return labels.view(height // side, side, width // side, side).permute(0, 2, 1, 3).flatten()


def label_map_loss(name: str, logits: Tensor, labels: Tensor, outputs: dict[str, Tensor], classes: int) -> Tensor:
    """Return the cross entropy of a label map, and write its accuracy over occupied cells to `outputs[name]`."""
    logits = logits.view(-1, classes)
    occupied = labels > 0
    outputs[name] = (logits.detach().argmax(-1)[occupied] == labels[occupied]).float().mean()
    weight = logits.new_ones(classes)
    weight[0] = _BACKGROUND_WEIGHT
    return F.cross_entropy(logits, labels, weight=weight)


def box_loss(predicted: Tensor, boxes: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """Return the smooth L1 loss of box sides, in cells (Fast R-CNN, arXiv 1504.08083).

    Args:
        predicted: (cells, 4).
        boxes: (occupied cells, 5), see `dense_labels.box_labels`.
        outputs: Receives the mean distance as `box_error`.
    """
    predicted = predicted[boxes[:, 0].long()]
    outputs["box_error"] = (predicted.detach() - boxes[:, 1:]).abs().mean()
    return F.smooth_l1_loss(predicted, boxes[:, 1:], beta=0.1, reduction="sum") / max(boxes[:, 1:].numel(), 1)


def offset_cells(rows: list[Tensor], counts: list[int]) -> Tensor:
    """Join per-image labels (n, k), whose first column is a cell of the image, so that it indexes cells of the batch.

    Args:
        rows: The labels of each image.
        counts: Number of cells of each image.
    """
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0).tolist()
    return torch.cat(
        [
            F.pad(item[:, :1] + start, (0, item.shape[1] - 1)) + F.pad(item[:, 1:], (1, 0))
            for item, start in zip(rows, starts, strict=True)
        ]
    )
