"""Data-dependent initialisation of the parts that stage 1 adds: the last stage of the tower, and the projector.

The features of a trained tower have a large common part. After new random layers, the language model would see visual
tokens that hardly differ, and a small model takes thousands of steps to ignore the common part. So the new layers are
shifted and scaled on a few pages until tokens have mean zero and a common size, similar to layer-sequential
unit-variance initialisation (arXiv 1511.06422).
"""

import torch
from torch import Tensor, nn

from convllava.model.modeling import ConvLlavaForConditionalGeneration, coordinate_features

TOKEN_RMS = 1.0
"""Root mean square of a visual token; a layer of the language model adds values of about this size."""


@torch.no_grad()
def calibrate(model: ConvLlavaForConditionalGeneration, images: list[Tensor]) -> None:
    """Centre and scale the outputs of the new layers on images of (3, height, width)."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    pixels, grids = tower.embeddings(images)
    *trained, new = tower.encoder.stages
    for stage in trained:
        pixels, grids = stage(pixels, grids)
    norm = new.downsampling_layer[0]
    norm.bias -= norm(pixels).mean(0)
    features, grids = new(pixels, grids)
    _standardise(projector.linear_1, features, 1.0)
    _standardise(projector.linear_2, projector.act(projector.linear_1(features)), TOKEN_RMS)
    if projector.coordinates is not None:
        places = torch.cat([coordinate_features(grid, features.device) for grid in grids])
        projector.coordinates.weight *= TOKEN_RMS / _rms(projector.coordinates(places))
    if projector.row_separator is not None:
        projector.row_separator *= TOKEN_RMS / _rms(projector.row_separator)


def _standardise(layer: nn.Linear, inputs: Tensor, rms: float) -> None:
    """Change the layer so that each output has mean zero on these inputs, and the outputs have this root mean
    square."""
    outputs = layer(inputs) - layer.bias
    outputs -= outputs.mean(0)
    layer.weight *= rms / _rms(outputs)
    layer.bias.copy_(-(inputs @ layer.weight.T).mean(0))


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
