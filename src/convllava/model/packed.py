"""The pixels of all images of a batch as one matrix, and back to rectangles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convllava.geometry import Size

Grids = tuple[Size, ...]
"""Rows and columns of each image's map."""


SMALL = 2**17
"""Numbers in a weight; a copy of half a megabyte costs nothing beside the maps that it is multiplied with."""


def rectangles(pixels: Tensor, grids: Grids) -> list[Tensor]:
    """(pixels, channels) -> one (images, height, width, channels) view per run of equal shapes."""
    runs: list[list[int]] = []  # by hand: a compiler cannot look through itertools.groupby
    for height, width in grids:
        if runs and runs[-1][1:] == [height, width]:
            runs[-1][0] += 1
        else:
            runs.append([1, height, width])
    parts = pixels.split([count * height * width for count, height, width in runs])
    return [part.view(count, height, width, -1) for part, (count, height, width) in zip(parts, runs, strict=True)]


def join(parts: list[Tensor]) -> Tensor:
    """One matrix of several, without a copy where there is one only."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_patches(convolution: Any, parts: Iterable[Tensor]) -> Tensor:
    """A convolution whose stride is its kernel, as a linear layer over the patches of (images, height, width, channels)
    each -> (patches, channels out).

    Any module with such a weight and bias will do: engines put classes of their own in the place of Conv2d.
    """
    weight = convolution.weight
    # By row, column, channel a patch lies in runs and is gathered several times as fast as by channel, row, column, as
    # weights lie. The copy of the weight that this takes is worth it where weights are small beside the maps.
    by_rows = weight.numel() <= SMALL
    matrix = join([_patches(maps, weight.shape[-1], by_rows) for maps in parts])
    return F.linear(matrix, (weight.permute(0, 2, 3, 1) if by_rows else weight).flatten(1), convolution.bias)


def _patches(maps: Tensor, side: int, by_rows: bool) -> Tensor:
    images, height, width, channels = maps.shape
    tiles = maps.view(images, height // side, side, width // side, side, channels)
    order = (0, 1, 3, 2, 4, 5) if by_rows else (0, 1, 3, 5, 2, 4)
    return tiles.permute(order).reshape(-1, side * side * channels)


def halve(grids: Grids) -> Grids:
    """Of the maps after a downsampling layer."""
    return tuple(Size(height // 2, width // 2) for height, width in grids)
