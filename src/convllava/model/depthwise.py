"""The depthwise convolution, with a gradient of its weight that a CPU makes quickly.

The gradient of a weight is a sum over all pixels of neighbour times gradient, one for each of 49 neighbours. torch
takes more than ten times as long for it as for the convolution itself. Here rows of pixels are multiplied and added to
49 sums, all channels and columns side by side as they lie in memory, and the columns are added up once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SUMS_BYTES = 2**19
"""Of the sums that are added to at a time, so that they stay in a cache."""


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of stride 1 that keeps the size, channels-last."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, maps: Tensor) -> Tensor:
        """(images, channels, height, width) to the same."""
        if _is_ours_faster(maps, self.weight):
            return _Depthwise.apply(maps, self.weight, self.bias)
        return super().forward(maps)


def _is_ours_faster(maps: Tensor, weight: Tensor) -> bool:
    """Where a weight in full precision trains on a CPU, and nothing traces: a compiler would unroll the rows. Under
    autocast always, so that a layer that trains is judged by the numbers that it trains with."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    autocast = torch.is_autocast_enabled("cpu")
    trains = autocast or (torch.is_grad_enabled() and weight.requires_grad)
    full = weight.dtype == torch.float32 and (maps.dtype == torch.float32 or autocast)
    return trains and full and type(weight) is nn.Parameter and maps.device.type == "cpu" and not traced


class _Depthwise(torch.autograd.Function):
    """In full precision under autocast too: torch's gradient in bfloat16 takes as long as its gradient in float32."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(maps, weight)
        return F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(  # type: ignore[override]  # the decorator forgets the types
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        maps, weight = ctx.saved_tensors
        size = weight.shape[-1]
        of_maps = of_bias = None
        if ctx.needs_input_grad[0]:
            of_maps = F.conv2d(gradient, weight.flip(2, 3), padding=size // 2, groups=len(weight))
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_maps, weight_gradient(maps.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1), size), of_bias


def weight_gradient(maps: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Of a convolution's input and its output's gradient, (images, height, width, channels) both -> (channels, 1, size,
    size)."""
    width, channels = gradient.shape[2:]
    columns = max(1, _SUMS_BYTES // (size * size * channels * gradient.element_size()))
    total = gradient.new_zeros(size, size, channels)
    for image, wanted in zip(maps, gradient, strict=True):
        padded = F.pad(image, (0, 0, size // 2, size // 2, size // 2, size // 2)).contiguous()
        windows = padded.unfold(0, size, 1).unfold(1, size, 1).permute(0, 3, 4, 1, 2)
        for left in range(0, width, columns):
            part = slice(left, left + columns)
            sums = total.new_zeros(size, size, min(columns, width - left), channels)
            for window, row in zip(windows[..., part, :], wanted[:, part], strict=True):
                sums.addcmul_(window, row)
            total += sums.sum(2)
    return total.permute(2, 0, 1).unsqueeze(1)
