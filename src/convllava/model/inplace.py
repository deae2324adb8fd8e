"""The tower without gradients: it works in place, on a part of the pixels at a time.

A block reads its input twice: as a neighbourhood (the depthwise convolution) and as the residual. Without gradients
nothing else of the input is needed later. So the output overwrites the input, and the hidden activations of the MLP,
four times as wide, exist only for as many pixels as fit in the cache. On a CPU fresh memory is the other cost: the
first access to it is slower than the arithmetic. So the parts share their buffers.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convllava.geometry import Size
from convllava.model.layers import ConvLlavaVisionEmbeddings, ConvLlavaVisionLayer, ConvLlavaVisionStage
from convllava.model.packed import Grids, by_patches, halve, join, rectangles

HALO = 3
"""Rows above and below a pixel that the 7x7 convolution sees."""
_STRIP_BYTES = {"cpu": 4 * 2**20}
"""Size of the rows that go through a convolution together."""
_HIDDEN_BYTES = {"cpu": 2 * 2**20}
"""Size of the hidden activations that exist at a time."""
ACCELERATOR_BYTES = 256 * 2**20
"""Replaces both on accelerators, where the number of kernel calls is the cost."""
_MIN_ROWS = 1024
"""Matrices with fewer rows (pixels) than this are slow to multiply."""
_PLAIN_MODULES = ("convllava.model", "transformers.activations", "torch.nn.modules.activation")


def is_possible(tower: nn.Module) -> bool:
    """Return whether the tower may run in place: no gradients, no autocast, no tracing, and only plain layers."""
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (torch.is_grad_enabled() or autocast or traced) and is_plain(tower)


def is_plain(tower: nn.Module) -> bool:
    """Return whether every layer is plain: no adapter, quantisation or hook."""
    for module in tower.modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        known = type(module) in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.ModuleList)
        if hooked or not (known or type(module).__module__.startswith(_PLAIN_MODULES)):
            return False
    return True


def encode(
    stem: ConvLlavaVisionEmbeddings, stages: Iterable[ConvLlavaVisionStage], images: list[Tensor]
) -> tuple[Tensor, Grids]:
    """Run the stem and some stages on whole images of (channels, height, width) -> (pixels, channels) and the grids."""
    pixels, grids = embed(stem, images)
    for stage in stages:
        pixels, grids = downsample(stage, pixels, grids)
        for layer in stage.layers:
            block(layer, pixels, grids)
    return pixels, grids


def embed(stem: ConvLlavaVisionEmbeddings, images: list[Tensor]) -> tuple[Tensor, Grids]:
    """Run the stem, some rows of patches at a time."""
    side, width = stem.patch_size, stem.patch_embeddings.out_channels
    grids = tuple(Size(image.shape[1] // side, image.shape[2] // side) for image in images)
    pixels = images[0].new_empty(sum(grid.height * grid.width for grid in grids), width)
    done = 0
    for image, grid in zip(images, grids, strict=True):
        for top, bottom in _strips(grid.height, grid.width * width * pixels.element_size(), pixels.device):
            maps = image[:, top * side : bottom * side].permute(1, 2, 0).unsqueeze(0)
            embedded = stem.layernorm(by_patches(stem.patch_embeddings, [maps]))
            pixels[done : done + len(embedded)] = embedded
            done += len(embedded)
    return pixels, grids


def downsample(stage: ConvLlavaVisionStage, pixels: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
    """Run the downsampling layer of a stage (LayerNorm, 2x2 patches to one), some rows at a time."""
    if not stage.downsampling_layer:
        return pixels, grids
    norm, convolution = stage.downsampling_layer
    result = pixels.new_empty(len(pixels) // 4, convolution.out_channels)
    done = 0
    for maps in _portions(pixels, grids):
        for top, bottom in _strips(maps.shape[1] // 2, 2 * _row_bytes(maps), pixels.device):
            # No variable keeps a strip, so its memory is free when the next one is made.
            target = result[done : done + maps.shape[0] * (bottom - top) * (maps.shape[2] // 2)]
            target.copy_(by_patches(convolution, [norm(maps[:, 2 * top : 2 * bottom])]))
            done += len(target)
    return result, halve(grids)


def block(layer: ConvLlavaVisionLayer, pixels: Tensor, grids: Grids) -> None:
    """Run one ConvNeXt block in place on (pixels, channels)."""
    done, waiting = 0, list[Tensor]()
    for part in _depthwise(layer, pixels, grids):
        waiting.append(part)
        if (ready := sum(map(len, waiting))) >= _MIN_ROWS or done + ready == len(pixels):
            mlp(layer, pixels[done : done + ready], join(waiting))
            done, waiting = done + ready, []


def _depthwise(layer: ConvLlavaVisionLayer, pixels: Tensor, grids: Grids) -> Iterator[Tensor]:
    """Yield the convolved pixels part by part, in order. The caller may overwrite the parts yielded before."""
    for maps in _portions(pixels, grids):
        bands = list(_efficient_strips(maps))
        if len(bands) == 1:
            yield convolve(layer, maps, HALO)
            continue
        # One map (1, height, width, channels) in strips: keep the rows above each strip, which the caller overwrites.
        edge = maps.new_zeros(1, HALO, *maps.shape[2:])
        above = edge
        for top, bottom in bands:
            below = maps[:, bottom : bottom + HALO]
            window = torch.cat([above, maps[:, top:bottom], below, edge[:, below.shape[1] :]], dim=1)
            above = window[:, bottom - top : bottom - top + HALO]
            yield convolve(layer, window, 0)


def convolve(layer: ConvLlavaVisionLayer, maps: Tensor, padding: int) -> Tensor:
    """Convolve (images, rows, width, channels) with `padding` zero rows above and below -> (pixels, channels)."""
    weight, bias = layer.dwconv.weight, layer.dwconv.bias
    result = F.conv2d(maps.permute(0, 3, 1, 2), weight, bias, padding=(padding, HALO), groups=len(weight))
    return result.permute(0, 2, 3, 1).reshape(-1, len(weight))


def mlp(layer: ConvLlavaVisionLayer, residual: Tensor, convolved: Tensor, min_rows: int = _MIN_ROWS) -> None:
    """Add LayerNorm, MLP and LayerScale of the convolved pixels to `residual` in place.

    Args:
        residual, convolved: (pixels, channels); `convolved` is overwritten.
        min_rows: Fewest rows of a matrix product, however large the hidden activations are.
    """
    channels = residual.shape[1]
    budget = _HIDDEN_BYTES.get(residual.device.type, ACCELERATOR_BYTES)
    rows = max(min_rows, budget // (4 * channels * residual.element_size()))
    rows = -(-len(residual) // -(-len(residual) // rows))  # parts of equal size
    wide = residual.new_empty(rows, 4 * channels)
    for target, source in zip(residual.split(rows), convolved.split(rows), strict=True):
        hidden = wide[: len(target)]
        torch.mm(layer.layernorm(source), layer.pwconv1.weight.T, out=hidden).add_(layer.pwconv1.bias)
        # The exact GELU, which all published ConvNeXts have, runs in place.
        is_gelu = getattr(layer.act, "act", layer.act) is F.gelu
        hidden = torch.ops.aten.gelu_(hidden) if is_gelu else layer.act(hidden)
        torch.mm(hidden, layer.pwconv2.weight.T, out=source).add_(layer.pwconv2.bias)
        target.addcmul_(source, layer.layer_scale_parameter)


def _portions(pixels: Tensor, grids: Grids) -> Iterator[Tensor]:
    """Yield (images, height, width, channels) views in order: equal shapes together if they fit in one strip."""
    for maps in rectangles(pixels, grids):
        together = len(list(_efficient_strips(maps))) == 1
        yield from [maps] if together else maps.split(1)


def _efficient_strips(maps: Tensor) -> Iterator[tuple[int, int]]:
    """Yield strips (first row, end row), each with enough pixels for an efficient matrix product."""
    images, height, width, _ = maps.shape
    return _strips(height, _row_bytes(maps), maps.device, -(-_MIN_ROWS // (images * width)))


def _row_bytes(maps: Tensor) -> int:
    return maps.shape[0] * maps.shape[2] * maps.shape[3] * maps.element_size()


def _strips(rows: int, row_bytes: int, device: torch.device, fewest: int = 1) -> Iterator[tuple[int, int]]:
    """Yield first and end row of strips of about equal height that fit in the cache, of at least `fewest` rows."""
    height = max(2 * HALO, _STRIP_BYTES.get(device.type, ACCELERATOR_BYTES) // row_bytes)
    height = -(-rows // max(1, min(-(-rows // height), rows // fewest)))
    for top in range(0, rows, height):
        yield top, min(top + height, rows)
