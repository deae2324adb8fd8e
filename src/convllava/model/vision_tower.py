"""The vision tower: a ConvNeXt of four or more stages that encodes images of different shapes in one batch.

ConvNeXt: arXiv 2201.03545. Five stages: ConvLLaVA, arXiv 2405.15738. `layers.py` explains how unequal shapes share one
batch without padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from convllava.errors import InputError
from convllava.geometry import Size
from convllava.model import inplace, streaming
from convllava.model.config import ConvLlavaVisionConfig
from convllava.model.layers import ConvLlavaVisionEmbeddings, ConvLlavaVisionEncoder, ConvLlavaVisionLayer
from convllava.model.packed import Grids, join


@dataclass
class ConvLlavaVisionOutput(ModelOutput):
    """Output of the tower.

    Attributes:
        last_hidden_state: (tokens of all images, channels), image after image, row by row: the raw last feature map.
        grids: Rows and columns of each image's feature map.
    """

    # ModelOutput demands these defaults; the tower always fills both.
    last_hidden_state: Tensor = None  # type: ignore[assignment]
    grids: Grids = None  # type: ignore[assignment]

    def maps(self) -> list[Tensor]:
        """Return one (rows, columns, channels) view per image."""
        parts = self.last_hidden_state.split([rows * columns for rows, columns in self.grids])
        return [part.unflatten(0, grid) for part, grid in zip(parts, self.grids, strict=True)]


@dataclass(frozen=True)
class ConvLlavaStageFeatures:
    """Images after the first stages of a tower. `ConvLlavaVisionModel.forward` runs the other stages on them.

    Attributes:
        pixels: (pixels of all images, channels), image after image, row by row.
        grids: Rows and columns of each image's feature map.
        stages: Number of stages that have run.
    """

    pixels: Tensor
    grids: Grids
    stages: int

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.grids)

    @classmethod
    def of_maps(cls, maps: Sequence[Tensor], stages: int) -> ConvLlavaStageFeatures:
        """Pack one (rows, columns, channels) map per image."""
        return cls(join([part.flatten(0, 1) for part in maps]), tuple(Size(*part.shape[:2]) for part in maps), stages)

    def maps(self) -> list[Tensor]:
        """Return one (rows, columns, channels) view per image."""
        return ConvLlavaVisionOutput(self.pixels, self.grids).maps()


class ConvLlavaVisionModel(PreTrainedModel):
    """The ConvNeXt tower. It has no pooling and no final norm: ConvLLaVA reads the raw last feature map."""

    config: ConvLlavaVisionConfig
    config_class = ConvLlavaVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    # The tower has no attention, so every attention implementation of the whole model is fine.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["ConvLlavaVisionLayer"]

    def __init__(self, config: ConvLlavaVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = ConvLlavaVisionEmbeddings(config)
        self.encoder = ConvLlavaVisionEncoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ConvLlavaVisionLayer):
            init.constant_(module.layer_scale_parameter, self.config.layer_scale_init_value)

    @torch.no_grad()
    def begin(self, images: list[Tensor], stages: int) -> ConvLlavaStageFeatures:
        """Run the stem and the first `stages` stages without gradients, in the precision of the tower's weights.

        Args:
            images: (channels, height, width) each; both sides multiples of the stride.
            stages: Number of stages to run.
        """
        with torch.autocast(self.device.type, enabled=False):
            images = [image.to(self.device, self.dtype) for image in images]
            return ConvLlavaStageFeatures(
                *inplace.encode(self.embeddings, self.encoder.stages[:stages], images), stages
            )

    def forward(
        self,
        pixel_values: Tensor | list[Tensor] | ConvLlavaStageFeatures,
        image_sizes: Tensor | None = None,
        band_rows: int | None = None,
    ) -> ConvLlavaVisionOutput:
        """Encode images of any shapes.

        Without gradients the tower works in place on a part of the pixels at a time (`inplace.py`), and images of more
        than 4 million pixels go through it in bands of rows (`streaming.py`). Both give the same numbers as the path
        with gradients, in a fraction of the memory.

        Args:
            pixel_values: (images, channels, height, width), or a list of (channels, height, width); or images that have
                gone through the first stages.
            image_sizes: (images, 2), height and width of each image inside a padded `pixel_values`. The padding is
                never read.
            band_rows: Rows of pixels in a band, for images of every size; without gradients only.

        Raises:
            InputError: if there is no image, a side is not a multiple of the stride, or `band_rows` is not usable.
        """
        if isinstance(pixel_values, ConvLlavaStageFeatures):
            pixels, grids = pixel_values.pixels, pixel_values.grids
            for stage in self.encoder.stages[pixel_values.stages :]:
                pixels, grids = stage(pixels, grids)
            return ConvLlavaVisionOutput(pixels, grids)
        images = list(pixel_values)
        if image_sizes is not None:
            sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
            images = [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]
        if not images:
            raise InputError("the vision tower got no image; give one or more")
        check_multiples([Size(*image.shape[1:]) for image in images], self.config.stride)
        images = [image.to(self.dtype) for image in images]
        if inplace.is_possible(self):
            return ConvLlavaVisionOutput(*streaming.encode(self.embeddings, self.encoder.stages, images, band_rows))
        if band_rows is not None:
            raise InputError(
                "`band_rows` is for inference only: call the tower in torch.no_grad(), without autocast, adapters or "
                "hooks"
            )
        return ConvLlavaVisionOutput(*self.encoder(*self.embeddings(images)))

    def stream(self, bands: Iterable[Tensor], height: int | None = None) -> Iterator[Tensor]:
        """Encode one image that is never in memory as a whole.

        Args:
            bands: The rows of the image from the top: (channels, rows, width) each; the number of rows is a multiple of
                the patch size. You may reuse one buffer for all bands.
            height: Height of the image in pixels, if known. Stages whose whole map is small are then kept in memory.

        Yields:
            The last feature map from the top: (rows, columns, channels) each.

        Raises:
            InputError: if the width or the number of all rows is not a multiple of the stride; or if the tower has
                adapters, hooks or quantised layers, or runs under autocast.
        """
        with torch.no_grad():
            possible = inplace.is_possible(self)
        if not possible:
            raise InputError("the tower cannot be streamed under autocast, or with adapters, hooks or quantised layers")
        return streaming.stream(self.embeddings, self.encoder.stages, bands, height)


def check_multiples(sizes: Iterable[Size], stride: int) -> None:
    """Check that the tower can halve images of these sizes (in pixels) in every stage.

    Raises:
        InputError: if a side is not a positive multiple of the stride; the message names the nearest size.
    """
    for height, width in sizes:
        if height % stride or width % stride or not height or not width:
            nearest = [max(stride, round(side / stride) * stride) for side in (height, width)]
            raise InputError(
                f"the vision tower got an image of {height}x{width} pixels (height x width), but both sides must be "
                f"multiples of its stride {stride}; resize it to {nearest[0]}x{nearest[1]}"
            )
