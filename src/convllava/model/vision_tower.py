"""The vision tower: a ConvNeXt of any number of stages that takes images of any shapes together.

Everything in a ConvNeXt but the 7x7 depthwise convolution works on one pixel at a time (or on one 2x2 patch). So the
pixels of all images of a batch lie in one (pixels, channels) matrix, and only the depthwise step looks at each image's
own rectangle: unequal shapes need no padding, and a batch gives what its images give alone. The parameters have the
names of `transformers.ConvNextModel`, so the same files load.

ConvNeXt: arXiv 2201.03545. Five stages: ConvLLaVA, arXiv 2405.15738.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from convllava.errors import InputError
from convllava.geometry import Size
from convllava.model import inplace, streaming
from convllava.model.config import ConvLlavaVisionConfig
from convllava.model.depthwise import DepthwiseConv2d
from convllava.model.packed import Grids, by_patches, halve, join, rectangles


@dataclass
class ConvLlavaVisionOutput(ModelOutput):
    """What the tower returns.

    Attributes:
        last_hidden_state: (tokens of all images, channels), image after image, row by row: the raw last feature map.
        grids: Rows and columns of each image's feature map.
    """

    # ModelOutput demands these defaults; the tower always fills both.
    last_hidden_state: Tensor = None  # type: ignore[assignment]  # a ModelOutput's fields have defaults
    grids: Grids = None  # type: ignore[assignment]  # as above

    def maps(self) -> list[Tensor]:
        """One (rows, columns, channels) view per image."""
        parts = self.last_hidden_state.split([rows * columns for rows, columns in self.grids])
        return [part.unflatten(0, grid) for part, grid in zip(parts, self.grids, strict=True)]


@dataclass(frozen=True)
class ConvLlavaStageFeatures:
    """Images that have gone through a tower's first stages, which `ConvLlavaVisionModel.forward` takes on.

    Attributes:
        pixels: (pixels of all images, channels), image after image, row by row.
        grids: Rows and columns of each image's feature map.
        stages: How many stages they have gone through.
    """

    pixels: Tensor
    grids: Grids
    stages: int

    def __len__(self) -> int:
        """How many images."""
        return len(self.grids)

    @classmethod
    def of_maps(cls, maps: Sequence[Tensor], stages: int) -> ConvLlavaStageFeatures:
        """From one (rows, columns, channels) map per image."""
        return cls(join([part.flatten(0, 1) for part in maps]), tuple(Size(*part.shape[:2]) for part in maps), stages)

    def maps(self) -> list[Tensor]:
        """One (rows, columns, channels) view per image."""
        return ConvLlavaVisionOutput(self.pixels, self.grids).maps()


class ConvLlavaVisionEmbeddings(nn.Module):
    """The stem: non-overlapping patches, a linear layer, LayerNorm."""

    def __init__(self, config: ConvLlavaVisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_sizes[0], kernel_size=config.patch_size, stride=config.patch_size
        )
        self.layernorm = nn.LayerNorm(config.hidden_sizes[0], eps=config.layer_norm_eps)

    def forward(self, images: list[Tensor]) -> tuple[Tensor, Grids]:
        """Images of (channels, height, width) -> (pixels, channels) at 1/patch_size and the grids."""
        side = self.patch_size
        grids = tuple(Size(image.shape[1] // side, image.shape[2] // side) for image in images)
        maps = (image.permute(1, 2, 0).unsqueeze(0) for image in images)
        return self.layernorm(by_patches(self.patch_embeddings, maps)), grids


class ConvLlavaVisionLayer(GradientCheckpointingLayer):
    """One ConvNeXt block: depthwise 7x7, LayerNorm, an MLP four times as wide, LayerScale, residual."""

    def __init__(self, config: ConvLlavaVisionConfig, channels: int) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv2d(channels, kernel_size=7)
        self.layernorm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = ACT2FN[config.hidden_act]
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.layer_scale_parameter = nn.Parameter(torch.full((channels,), config.layer_scale_init_value))

    def depthwise(self, pixels: Tensor, grids: Grids) -> Tensor:
        """The only step that sees neighbours: run on each image's own rectangle, in channels-last memory."""
        maps = [self.dwconv(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for part in rectangles(pixels, grids)]
        return join([part.reshape(-1, part.shape[-1]) for part in maps])

    def forward(self, pixels: Tensor, grids: Grids) -> Tensor:
        hidden = self.layernorm(self.depthwise(pixels, grids))
        hidden = self.pwconv2(self.act(self.pwconv1(hidden)))
        return torch.addcmul(pixels, hidden, self.layer_scale_parameter)


class ConvLlavaVisionStage(nn.Module):
    """A downsampling layer (LayerNorm, 2x2 patches to one) except in the first stage, then blocks."""

    def __init__(self, config: ConvLlavaVisionConfig, index: int) -> None:
        super().__init__()
        channels = config.hidden_sizes[index]
        self.downsampling_layer = nn.ModuleList()
        if index > 0:
            before = config.hidden_sizes[index - 1]
            self.downsampling_layer.append(nn.LayerNorm(before, eps=config.layer_norm_eps))
            self.downsampling_layer.append(nn.Conv2d(before, channels, kernel_size=2, stride=2))
        self.layers = nn.ModuleList(ConvLlavaVisionLayer(config, channels) for _ in range(config.depths[index]))

    def downsample(self, pixels: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
        if not self.downsampling_layer:
            return pixels, grids
        norm, convolution = self.downsampling_layer
        return by_patches(convolution, rectangles(norm(pixels), grids)), halve(grids)

    def forward(self, pixels: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
        pixels, grids = self.downsample(pixels, grids)
        for layer in self.layers:
            pixels = layer(pixels, grids)
        return pixels, grids


class ConvLlavaVisionEncoder(nn.Module):
    def __init__(self, config: ConvLlavaVisionConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(ConvLlavaVisionStage(config, index) for index in range(config.num_stages))

    def forward(self, pixels: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
        for stage in self.stages:
            pixels, grids = stage(pixels, grids)
        return pixels, grids


class ConvLlavaVisionModel(PreTrainedModel):
    """The five-stage ConvNeXt tower. No pooling and no final norm: ConvLLaVA reads the raw last feature map."""

    config: ConvLlavaVisionConfig
    config_class = ConvLlavaVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    # There is no attention in the tower, so whatever the whole model is asked to use is fine.
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
        """Images of (channels, height, width), whose sides are multiples of the stride, through the stem and the first
        `stages` stages: without gradients, in the tower's own precision, as for inference."""
        with torch.autocast(self.device.type, enabled=False):
            images = [image.to(self.device, self.dtype) for image in images]
            return ConvLlavaStageFeatures(*inplace.encode(self, images, stages), stages)

    def forward(
        self,
        pixel_values: Tensor | list[Tensor] | ConvLlavaStageFeatures,
        image_sizes: Tensor | None = None,
        band_rows: int | None = None,
    ) -> ConvLlavaVisionOutput:
        """Encode images of any shapes.

        Without gradients the tower works in place, a part of the pixels at a time (`vision.inference`), and images of
        more than 4 million pixels go through it in bands of rows (`vision.streaming`): the same numbers, in a fraction
        of the memory.

        Args:
            pixel_values: (images, channels, height, width), or a list of (channels, height, width); or images that have
                gone through the first stages.
            image_sizes: (images, 2), height and width of each image inside a padded `pixel_values`; what lies beyond
                is never looked at.
            band_rows: Rows of pixels in a band, for images of every size; without gradients only.

        Raises:
            InputError: a side is no multiple of the stride, or a band is too small.
        """
        if isinstance(pixel_values, ConvLlavaStageFeatures):
            return self._finish(pixel_values)
        images = _unpad(pixel_values, image_sizes)
        if not images:
            raise InputError("the vision tower got no image; give one or more")
        check_multiples([Size(*image.shape[1:]) for image in images], self.config.stride)
        images = [image.to(self.dtype) for image in images]
        if inplace.is_possible(self):
            return ConvLlavaVisionOutput(*streaming.encode(self, images, band_rows))
        if band_rows is not None:
            raise InputError(
                "band_rows is for inference: wrap the call in torch.no_grad(), without autocast, adapters or hooks"
            )
        pixels, grids = self.embeddings(images)
        pixels, grids = self.encoder(pixels, grids)
        return ConvLlavaVisionOutput(last_hidden_state=pixels, grids=grids)

    def _finish(self, features: ConvLlavaStageFeatures) -> ConvLlavaVisionOutput:
        pixels, grids = features.pixels, features.grids
        for stage in self.encoder.stages[features.stages :]:
            pixels, grids = stage(pixels, grids)
        return ConvLlavaVisionOutput(last_hidden_state=pixels, grids=grids)

    def stream(self, bands: Iterable[Tensor], height: int | None = None) -> Iterator[Tensor]:
        """Encode one image that is never held as a whole.

        Args:
            bands: Its rows from the top: (channels, rows, width) each, rows a multiple of the patch size. One buffer
                may serve for all.
            height: Of all bands, if known: stages that are cheaper to hold than to stream are then held.

        Yields:
            The last feature map from the top: (rows, columns, channels) each.

        Raises:
            InputError: the width or the sum of all rows is no multiple of the stride; or the tower has adapters, hooks
                or quantised layers, or runs under autocast.
        """
        return streaming.stream(self, bands, height)


def _unpad(pixel_values: Tensor | list[Tensor], image_sizes: Tensor | None) -> list[Tensor]:
    if image_sizes is None:
        return list(pixel_values)
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    return [image[:, :height, :width] for image, (height, width) in zip(pixel_values, sizes, strict=True)]


def check_multiples(sizes: Iterable[Size], stride: int) -> None:
    """Refuse what the tower cannot halve often enough.

    Raises:
        InputError: names the nearest size.
    """
    for height, width in sizes:
        if height % stride or width % stride or not height or not width:
            nearest = [max(stride, round(side / stride) * stride) for side in (height, width)]
            raise InputError(
                f"the vision tower got an image of {height}x{width} pixels, but both sides must be multiples of its "
                f"stride {stride}; resize it to {nearest[0]}x{nearest[1]}"
            )
