"""The pixels of all images of a batch as one matrix, and back to rectangles."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convllava.geometry import Size

Grids = tuple[Size, ...]
"""Rows and columns of each image's map."""


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


def patches(maps: Tensor, side: int) -> Tensor:
    """(images, height, width, channels) -> (patches, side * side * channels): by row, column, channel, in which a patch
    lies in memory in runs; one by channel, as a Conv2d's weight lies, takes many times as long to gather."""
    images, height, width, channels = maps.shape
    tiles = maps.view(images, height // side, side, width // side, side, channels)
    return tiles.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side * channels)


def as_linear(convolution: Any, matrix: Tensor) -> Tensor:
    """A convolution whose stride is its kernel is a linear layer over patches.

    Any module with such a weight and bias will do: engines put classes of their own in the place of Conv2d.
    """
    return F.linear(matrix, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)


def halve(grids: Grids) -> Grids:
    """Of the maps after a downsampling layer."""
    return tuple(Size(height // 2, width // 2) for height, width in grids)
