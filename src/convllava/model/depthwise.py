"""The depthwise convolution with a fast weight gradient on CPUs.

The gradient of each of the 49 weights is a sum over all pixels: a neighbour times the pixel's gradient. torch needs
more than ten times as long for it as for the convolution itself. Here rows of pixels are multiplied and added to 49
running sums, with all channels and columns in memory order, and the columns are summed once at the end.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SUMS_BYTES = 2**19
"""Size of the running sums, so that they stay in the cache."""


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of stride 1 that keeps the size; fastest in channels-last memory."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Convolve (images, channels, height, width); the shape stays the same."""
        if _is_ours_faster(maps, self.weight):
            return _Depthwise.apply(maps, self.weight, self.bias)
        return super().forward(maps)


def _is_ours_faster(maps: Tensor, weight: Tensor) -> bool:
    """Return whether to use our gradient: for float32 weights that train on a CPU.

    Under autocast always, so that evaluation uses the same numbers as training. Never while tracing, because a compiler
    would unroll the loop over rows.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    autocast = torch.is_autocast_enabled("cpu")
    trains = autocast or (torch.is_grad_enabled() and weight.requires_grad)
    full = weight.dtype == torch.float32 and (maps.dtype == torch.float32 or autocast)
    return trains and full and type(weight) is nn.Parameter and maps.device.type == "cpu" and not traced


class _Depthwise(torch.autograd.Function):
    """The convolution with our gradient. It runs in float32 under autocast too: in bfloat16 torch's gradient takes as
    long as in float32."""

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
        maps_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            maps_gradient = F.conv2d(gradient, weight.flip(2, 3), padding=size // 2, groups=len(weight))
        if ctx.needs_input_grad[2]:
            bias_gradient = gradient.sum((0, 2, 3))
        ours = weight_gradient(maps.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1), size)
        return maps_gradient, ours, bias_gradient


def weight_gradient(maps: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Return the gradient (channels, 1, size, size) of a convolution's weight.

    Args:
        maps: The input, (images, height, width, channels).
        gradient: The gradient of the output, of the same shape.
        size: Side of the kernel.
    """
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
