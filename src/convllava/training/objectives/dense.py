"""Dense pretraining: the substitute for CLIP if there is no pretrained ConvNeXt.

The first four stages learn what is in each cell of a page: the character over each cell of 8 pixels, predicted from the
feature maps of stages 2, 3 and 4 (strides 8, 16 and 32, so that one feature of stage 4 predicts sixteen cells), and the
shape and colour of the object over each cell of the last grid. With labels of single cells, a small tower learns in
minutes to recognise characters; captions of whole images do not achieve this. Every stage predicts characters, so the
early stages learn before the late ones can use them.
"""

import torch
from torch import Tensor, nn

from convllava.data.dense_labels import DENSE_CLASSES, GLYPH_CELL
from convllava.errors import ConfigError
from convllava.model.vision_tower import ConvLlavaVisionModel
from convllava.training.objectives.losses import flatten_cells, label_map_loss

STAGES = 4
_CHARACTER_STAGES = (2, 3, 4)
_PATCH = 4
"""The patch size in pixels for which the stages have the strides of the labels."""


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

        `pixel_values` holds images of (3, height, width); the other arguments hold the labels of `DenseDataset`, one
        item per image.
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
