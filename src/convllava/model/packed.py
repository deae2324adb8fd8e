"""Pack the pixels of all images of a batch into one matrix, and split it into images again."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convllava.geometry import Size

Grids = tuple[Size, ...]
"""Rows and columns of each image's map."""
SMALL_WEIGHT = 2**17
"""Largest weight, in numbers (half a megabyte), whose copy takes almost no time compared with the product."""


def rectangles(pixels: Tensor, grids: Grids) -> list[Tensor]:
    """Split (pixels, channels) into (images, height, width, channels) views: one per run of equal shapes."""
    runs: list[list[int]] = []  # no itertools.groupby: torch.compile cannot trace it
    for height, width in grids:
        if runs and runs[-1][1:] == [height, width]:
            runs[-1][0] += 1
        else:
            runs.append([1, height, width])
    parts = pixels.split([count * height * width for count, height, width in runs])
    return [part.view(count, height, width, -1) for part, (count, height, width) in zip(parts, runs, strict=True)]


def join(parts: list[Tensor]) -> Tensor:
    """Concatenate matrices; a single one is returned without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_patches(convolution: Any, parts: Iterable[Tensor]) -> Tensor:
    """Run a convolution whose stride equals its kernel as a linear layer over patches.

    Args:
        convolution: Any module with the weight and bias of a Conv2d: serving engines replace the class.
        parts: (images, height, width, channels) each.

    Returns:
        (patches, output channels).
    """
    weight = convolution.weight
    # In the order row, column, channel a patch has contiguous runs, and gathering it is several times as fast as in the
    # weight's order channel, row, column. That needs a copy of the weight, which pays off if the weight is small.
    by_rows = weight.numel() <= SMALL_WEIGHT
    side, order = weight.shape[-1], (0, 1, 3, 2, 4, 5) if by_rows else (0, 1, 3, 5, 2, 4)
    tiles = (maps.unflatten(2, (-1, side)).unflatten(1, (-1, side)) for maps in parts)  # six dimensions each
    matrix = join([tile.permute(order).reshape(-1, weight[0].numel()) for tile in tiles])
    return F.linear(matrix, (weight.permute(0, 2, 3, 1) if by_rows else weight).flatten(1), convolution.bias)


def halve(grids: Grids) -> Grids:
    """Return the grids after a downsampling layer."""
    return tuple(Size(height // 2, width // 2) for height, width in grids)
