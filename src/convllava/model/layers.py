"""The layers of the vision tower: stem, block and stage of a ConvNeXt (arXiv 2201.03545) over packed pixels.

Every layer of a ConvNeXt except the 7x7 depthwise convolution works on single pixels (or on single patches). So the
pixels of all images of a batch form one (pixels, channels) matrix, and only the depthwise convolution splits it into
the images again. Images of different shapes need no padding, and a batch gives the same numbers as its images alone.

The parameters have the names of `transformers.ConvNextModel`, so the same files load.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from convllava.geometry import Size
from convllava.model.config import ConvLlavaVisionConfig
from convllava.model.depthwise import DepthwiseConv2d
from convllava.model.packed import Grids, by_patches, halve, join, rectangles


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

    def forward(self, pixels: Tensor, grids: Grids) -> Tensor:
        # Only the depthwise convolution sees neighbours. It runs on each image's own rectangle, channels last.
        maps = [self.dwconv(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for part in rectangles(pixels, grids)]
        hidden = self.layernorm(join([part.reshape(-1, part.shape[-1]) for part in maps]))
        hidden = self.pwconv2(self.act(self.pwconv1(hidden)))
        return torch.addcmul(pixels, hidden, self.layer_scale_parameter)


class ConvLlavaVisionStage(nn.Module):
    """A downsampling layer (LayerNorm, 2x2 patches to one) except in the first stage, then blocks."""

    layers: Any  # a ModuleList of ConvLlavaVisionLayer
    downsampling_layer: Any  # a ModuleList: empty, or a LayerNorm and a Conv2d

    def __init__(self, config: ConvLlavaVisionConfig, index: int) -> None:
        super().__init__()
        channels = config.hidden_sizes[index]
        self.downsampling_layer = nn.ModuleList()
        if index > 0:
            before = config.hidden_sizes[index - 1]
            self.downsampling_layer.append(nn.LayerNorm(before, eps=config.layer_norm_eps))
            self.downsampling_layer.append(nn.Conv2d(before, channels, kernel_size=2, stride=2))
        self.layers = nn.ModuleList(ConvLlavaVisionLayer(config, channels) for _ in range(config.depths[index]))

    def forward(self, pixels: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
        if self.downsampling_layer:
            norm, convolution = self.downsampling_layer
            pixels, grids = by_patches(convolution, rectangles(norm(pixels), grids)), halve(grids)
        for layer in self.layers:
            pixels = layer(pixels, grids)
        return pixels, grids


class ConvLlavaVisionEncoder(nn.Module):
    """All stages, one after the other."""

    stages: Any  # a ModuleList of ConvLlavaVisionStage

    def __init__(self, config: ConvLlavaVisionConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(ConvLlavaVisionStage(config, index) for index in range(config.num_stages))

    def forward(self, pixels: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
        for stage in self.stages:
            pixels, grids = stage(pixels, grids)
        return pixels, grids
