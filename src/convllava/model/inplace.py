"""The tower without gradients: in place, a part of the pixels at a time.

A block reads its input once as a neighbourhood (the depthwise convolution) and once as a residual. Nothing else of it
is needed later, so the output takes the input's place, and what lies between, four times as wide, is made for as many
pixels as fit a cache. Fresh memory is the other cost on a CPU: its first touch is slower than the arithmetic on it, so
the parts share their buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convllava.geometry import Size
from convllava.model.packed import Grids, by_patches, halve, join, rectangles

if TYPE_CHECKING:
    from convllava.model.vision_tower import ConvLlavaVisionLayer, ConvLlavaVisionModel, ConvLlavaVisionStage

HALO = 3
"""Rows above and below a pixel that the 7x7 convolution sees."""
_STRIP_BYTES = {"cpu": 4 * 2**20}
"""Of the rows that go through a convolution together."""
_HIDDEN_BYTES = {"cpu": 2 * 2**20}
"""Of the hidden activations that exist at a time; matrices of fewer than `_FEWEST` rows are slow to multiply."""
ELSEWHERE = 256 * 2**20
"""In place of both on accelerators, whose cost is in the number of calls."""
_FEWEST = 1024


def is_possible(tower: ConvLlavaVisionModel) -> bool:
    """Whether nothing asks for the path that trains: no gradient, no autocast, no compiler or exporter that traces, and
    no layer that does more than its weights say (adapters, quantisation, hooks such as those that move weights)."""
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (torch.is_grad_enabled() or autocast or traced) and is_plain(tower)


def is_plain(tower: ConvLlavaVisionModel) -> bool:
    """Whether no layer does more than its weights say."""
    return all(map(_is_plain, tower.modules()))


_PLAIN = ("convllava.model", "transformers.activations", "torch.nn.modules.activation")


def _is_plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    own = type(module) in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.ModuleList)
    return not hooked and (own or type(module).__module__.startswith(_PLAIN))


def encode(tower: ConvLlavaVisionModel, images: list[Tensor], stages: int | None = None) -> tuple[Tensor, Grids]:
    """Whole images of (channels, height, width) -> the feature maps after so many stages, or all, as one matrix, and
    their grids."""
    pixels, grids = embed(tower, images)
    for stage in stages_of(tower)[:stages]:
        pixels, grids = downsample(stage, pixels, grids)
        for layer in layers_of(stage):
            block(layer, pixels, grids)
    return pixels, grids


def stages_of(tower: ConvLlavaVisionModel) -> list[ConvLlavaVisionStage]:
    """With the type that a ModuleList forgets."""
    stages: Any = tower.encoder.stages
    return list(stages)


def layers_of(stage: ConvLlavaVisionStage) -> list[ConvLlavaVisionLayer]:
    """With the type that a ModuleList forgets."""
    layers: Any = stage.layers
    return list(layers)


def embed(tower: ConvLlavaVisionModel, images: list[Tensor]) -> tuple[Tensor, Grids]:
    """The stem, some rows of patches at a time."""
    stem, side = tower.embeddings, tower.embeddings.patch_size
    grids = tuple(Size(image.shape[1] // side, image.shape[2] // side) for image in images)
    width = stem.patch_embeddings.out_channels
    pixels = images[0].new_empty(sum(grid.height * grid.width for grid in grids), width)
    done = 0
    for image, grid in zip(images, grids, strict=True):
        for top, bottom in strips(grid.height, grid.width * width * pixels.element_size(), pixels.device):
            maps = image[:, top * side : bottom * side].permute(1, 2, 0).unsqueeze(0)
            embedded = stem.layernorm(by_patches(stem.patch_embeddings, [maps]))
            pixels[done : done + len(embedded)] = embedded
            done += len(embedded)
    return pixels, grids


def downsample(stage: ConvLlavaVisionStage, pixels: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
    """LayerNorm and 2x2 patches to one, some rows at a time."""
    if not stage.downsampling_layer:
        return pixels, grids
    layers: Any = stage.downsampling_layer
    norm, convolution = layers
    result = pixels.new_empty(len(pixels) // 4, convolution.out_channels)
    done = 0
    for maps in portions(pixels, grids):
        for top, bottom in strips(maps.shape[1] // 2, 2 * _row_bytes(maps), pixels.device):
            # Nothing of a strip has a name, so that nothing of it is there when the next one is made.
            target = result[done : done + maps.shape[0] * (bottom - top) * (maps.shape[2] // 2)]
            target.copy_(by_patches(convolution, [norm(maps[:, 2 * top : 2 * bottom])]))
            done += len(target)
    return result, halve(grids)


def block(layer: ConvLlavaVisionLayer, pixels: Tensor, grids: Grids) -> None:
    """One ConvNeXt block in place."""
    done, waiting = 0, list[Tensor]()
    for part in _depthwise(layer, pixels, grids):
        waiting.append(part)
        if (ready := sum(map(len, waiting))) >= _FEWEST or done + ready == len(pixels):
            mlp(layer, pixels[done : done + ready], join(waiting))
            done, waiting = done + ready, []


def _depthwise(layer: ConvLlavaVisionLayer, pixels: Tensor, grids: Grids) -> Iterator[Tensor]:
    """The convolved pixels part by part, in their order; the parts yielded before may have been overwritten."""
    for maps in portions(pixels, grids):
        bands = list(_whole_products(maps))
        if len(bands) == 1:
            yield convolve(layer, maps, HALO)
        else:
            yield from _in_strips(layer, maps, bands)


def _in_strips(layer: ConvLlavaVisionLayer, maps: Tensor, bands: list[tuple[int, int]]) -> Iterator[Tensor]:
    """As `_depthwise` of one map (1, height, width, channels), with the rows above each strip kept as they were."""
    edge = maps.new_zeros(1, HALO, *maps.shape[2:])
    above = edge
    for top, bottom in bands:
        below = maps[:, bottom : bottom + HALO]
        window = torch.cat([above, maps[:, top:bottom], below, edge[:, below.shape[1] :]], dim=1)
        above = window[:, bottom - top : bottom - top + HALO]
        yield convolve(layer, window, 0)


def convolve(layer: ConvLlavaVisionLayer, maps: Tensor, padding: int) -> Tensor:
    """(images, rows, width, channels), in channels-last memory, padded by so many rows -> (pixels, channels)."""
    weight, bias = layer.dwconv.weight, layer.dwconv.bias
    result = F.conv2d(maps.permute(0, 3, 1, 2), weight, bias, padding=(padding, HALO), groups=len(weight))
    return result.permute(0, 2, 3, 1).reshape(-1, len(weight))


def mlp(layer: ConvLlavaVisionLayer, residual: Tensor, convolved: Tensor, fewest: int = _FEWEST) -> None:
    """LayerNorm, MLP and LayerScale of convolved pixels, added to `residual` in place; (pixels, channels) both.
    `convolved` is overwritten. `fewest`: rows of a product that are worth it, whatever the hidden activations take."""
    channels = residual.shape[1]
    budget = _HIDDEN_BYTES.get(residual.device.type, ELSEWHERE)
    rows = max(fewest, budget // (4 * channels * residual.element_size()))
    rows = -(-len(residual) // -(-len(residual) // rows))  # parts of equal size
    wide = residual.new_empty(rows, 4 * channels)
    for target, source in zip(residual.split(rows), convolved.split(rows), strict=True):
        hidden = wide[: len(target)]
        torch.mm(layer.layernorm(source), layer.pwconv1.weight.T, out=hidden).add_(layer.pwconv1.bias)
        hidden = _activate(layer.act, hidden)
        torch.mm(hidden, layer.pwconv2.weight.T, out=source).add_(layer.pwconv2.bias)
        target.addcmul_(source, layer.layer_scale_parameter)


def _activate(activation: Any, hidden: Tensor) -> Tensor:
    """In place where it is the exact GELU, which all published ConvNeXts have."""
    if getattr(activation, "act", activation) is F.gelu:
        return torch.ops.aten.gelu_(hidden)
    return activation(hidden)


def portions(pixels: Tensor, grids: Grids) -> Iterator[Tensor]:
    """(images, height, width, channels) views in the matrix's order: equal shapes together where they fit one strip."""
    for maps in rectangles(pixels, grids):
        together = len(list(_whole_products(maps))) == 1
        yield from [maps] if together else maps.split(1)


def _whole_products(maps: Tensor) -> Iterator[tuple[int, int]]:
    """Strips (first row, last row) of which each alone is worth multiplying."""
    images, height, width, _ = maps.shape
    return strips(height, _row_bytes(maps), maps.device, -(-_FEWEST // (images * width)))


def _row_bytes(maps: Tensor) -> int:
    return maps.shape[0] * maps.shape[2] * maps.shape[3] * maps.element_size()


def strips(rows: int, row_bytes: int, device: torch.device, fewest: int = 1) -> Iterator[tuple[int, int]]:
    """First and last row of strips of about equal height, each small enough to be worked on at once, but of no fewer
    rows than that."""
    height = max(2 * HALO, _STRIP_BYTES.get(device.type, ELSEWHERE) // row_bytes)
    height = -(-rows // max(1, min(-(-rows // height), rows // fewest)))
    for top in range(0, rows, height):
        yield top, min(top + height, rows)
