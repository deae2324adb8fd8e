"""FastViTHD, the visual encoder of FastVLM, after reparameterisation and with random weights: to measure its cost.

In training it has extra branches next to every convolution. For inference they are folded into one convolution, and
the residual of a convolutional token mixer into its kernel. FastVLM: arXiv 2412.13303. FastViT: arXiv 2303.14189.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (2, 12, 24, 4, 2)
WIDTHS = (96, 192, 384, 768, 1536)
STRIDE = 64
_FIRST_ATTENTION_STAGE = 3
"""Stages before this one mix tokens by convolution."""
_HEAD_WIDTH = 32
_SQUEEZE_RATIO = 16


class FastVitHD(nn.Sequential):
    """FastViTHD: (images, 3, height, width) -> (images, 3072, height/64, width/64)."""

    def __init__(self) -> None:
        first, last = WIDTHS[0], WIDTHS[-1]
        stem = (
            nn.Conv2d(3, first, 3, stride=2, padding=1),
            nn.GELU(),
            _depthwise(first, 3, stride=2),
            nn.GELU(),
            nn.Conv2d(first, first, 1),
            nn.GELU(),
        )
        head = (nn.Conv2d(last, 2 * last, 3, padding=1, groups=last), _SqueezeExcitation(2 * last), nn.GELU())
        super().__init__(*stem, *(layer for stage in range(len(WIDTHS)) for layer in _stage(stage)), *head)


def _stage(index: int) -> list[nn.Module]:
    """Return the layers of one stage: downsampling (not in the first), position encoding before attention, blocks."""
    width, attends = WIDTHS[index], index >= _FIRST_ATTENTION_STAGE
    layers: list[nn.Module] = []
    if index:
        before = WIDTHS[index - 1]
        downsampling = nn.Conv2d(before, width, 7, stride=2, padding=3, groups=before)
        layers += [downsampling, nn.GELU(), nn.Conv2d(width, width, 1), nn.GELU()]
    if attends:
        layers.append(_depthwise(width, 7))
    for _ in range(DEPTHS[index]):
        mlp = (_depthwise(width, 7), nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))
        layers += [_Residual(_Attention(width)) if attends else _depthwise(width, 3), _Residual(nn.Sequential(*mlp))]
    return layers


def _depthwise(width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, width, kernel, stride=stride, padding=kernel // 2, groups=width)


class _Residual(nn.Module):
    """Adds a branch to its input. The layer scale is folded into the branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.branch(maps)


class _Attention(nn.Module):
    """LayerNorm over the channels, then attention over all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.norm(maps.flatten(2).transpose(1, 2))
        queries, keys, values = self.qkv(tokens).unflatten(-1, (3, -1, _HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.projection(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, maps.shape[2:])


class _SqueezeExcitation(nn.Module):
    """Scales each channel by a weight that depends on the mean of all channels over the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(width, width // _SQUEEZE_RATIO), nn.Linear(width // _SQUEEZE_RATIO, width)

    def forward(self, maps: Tensor) -> Tensor:
        weights = self.excite(F.relu(self.squeeze(maps.mean((2, 3))))).sigmoid()
        return maps * weights[..., None, None]
