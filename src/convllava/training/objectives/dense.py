"""Dense pre-training: the stand-in for CLIP where no pretrained ConvNeXt can be had.

The first four stages learn what stands where: the character over each 8-pixel cell, told from the maps of stages 2, 3
and 4 (strides 8, 16 and 32, so that one feature of stage 4 has sixteen cells to tell), and the shape and colour of the
object over each cell of the last grid. Labels of single cells teach a small tower in minutes what image-level captions
do not, and every stage being asked for the characters lets the early ones learn before the late ones can use them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convllava.data.dense_labels import DENSE_CLASSES, GLYPH_CELL
from convllava.errors import InputError
from convllava.model.vision_tower import ConvLlavaVisionModel

STAGES = 4
_READING_STAGES = (2, 3, 4)
_PATCH = 4
"""Pixels of a patch with which the stages have the strides that the labels are made for."""
_BACKGROUND_WEIGHT = 0.03
"""Most cells are empty; at full weight they drown the rest."""


class DensePretraining(nn.Module):
    """The four-stage tower with linear heads that training throws away.

    Raises:
        InputError: the tower's patches are not those that the labels are for.
    """

    def __init__(self, vision_tower: ConvLlavaVisionModel) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        widths = vision_tower.config.hidden_sizes
        patch = vision_tower.config.patch_size
        if patch != _PATCH:
            raise InputError(
                f"objective dense labels cells of 8 pixels, for a patch_size of {_PATCH}; the tower's is {patch}"
            )
        self.sides = {stage: patch * 2 ** (stage - 1) // GLYPH_CELL for stage in _READING_STAGES}
        self.head = nn.ModuleDict()
        for stage, side in self.sides.items():
            self.head[f"norm{stage}"] = nn.LayerNorm(widths[stage - 1])
            self.head[f"glyph{stage}"] = nn.Linear(widths[stage - 1], side**2 * DENSE_CLASSES["glyph"])
        for name in ("shape", "colour"):
            self.head[name] = nn.Linear(widths[STAGES - 1], DENSE_CLASSES[name])

    def forward(
        self, pixel_values: list[Tensor], glyph: list[Tensor], shape: list[Tensor], colour: list[Tensor]
    ) -> dict[str, Tensor]:
        """Images of (3, height, width) and the label maps of `DenseDataset` -> loss, and accuracy per map.

        Accuracies are the last stage's, over the cells where something stands.
        """
        outputs: dict[str, Tensor] = {}
        losses = []
        pixels, grids = self.vision_tower.embeddings(pixel_values)
        for number, stage in enumerate(self.vision_tower.encoder.stages[:STAGES], start=1):
            pixels, grids = stage(pixels, grids)
            if number in self.sides:
                features = self.head[f"norm{number}"](pixels)
                labels = torch.cat([cells(item, self.sides[number]) for item in glyph])
                losses.append(
                    judge("glyph", self.head[f"glyph{number}"](features), labels, outputs, DENSE_CLASSES["glyph"])
                )
        for name, maps in (("shape", shape), ("colour", colour)):
            labels = torch.cat([item.flatten() for item in maps])
            losses.append(judge(name, self.head[name](features), labels, outputs, DENSE_CLASSES[name]))
        return {"loss": torch.stack(losses).sum(), **outputs}


def cells(labels: Tensor, side: int) -> Tensor:
    """(height, width) labels -> one per feature and cell, for features that each cover side x side cells."""
    height, width = labels.shape
    return labels.view(height // side, side, width // side, side).permute(0, 2, 1, 3).flatten()


def judge(name: str, logits: Tensor, labels: Tensor, outputs: dict[str, Tensor], classes: int) -> Tensor:
    """The loss of one head of the label map `name`; notes its accuracy over occupied cells in `outputs`."""
    logits = logits.view(-1, classes)
    occupied = labels > 0
    outputs[name] = (logits.detach().argmax(-1)[occupied] == labels[occupied]).float().mean()
    weight = logits.new_ones(classes)
    weight[0] = _BACKGROUND_WEIGHT
    return F.cross_entropy(logits, labels, weight=weight)


def box_loss(found: Tensor, boxes: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """Smooth L1 distance of the sides of what stands in a cell, in cells (Fast R-CNN, arXiv 1504.08083); notes the mean
    distance in `outputs`. `found` is (cells, 4), `boxes` as of `data.cells.boxes`."""
    found = found[boxes[:, 0].long()]
    outputs["box_error"] = (found.detach() - boxes[:, 1:]).abs().mean()
    return F.smooth_l1_loss(found, boxes[:, 1:], beta=0.1, reduction="sum") / max(boxes[:, 1:].numel(), 1)


def numbered(rows: list[Tensor], counts: list[int]) -> Tensor:
    """Per image (n, k) whose first column is a cell of that image -> one, its cells counted through the batch."""
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0).tolist()
    return torch.cat(
        [
            F.pad(item[:, :1] + start, (0, item.shape[1] - 1)) + F.pad(item[:, 1:], (1, 0))
            for item, start in zip(rows, starts, strict=True)
        ]
    )
