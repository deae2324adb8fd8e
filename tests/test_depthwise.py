"""The gradient of the depthwise convolution equals PyTorch's, and is used only for trained float32 weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import encoders
from convllava.model import depthwise
from convllava.model.config import ConvLlavaVisionConfig
from convllava.model.depthwise import DepthwiseConv2d
from convllava.model.vision_tower import ConvLlavaVisionModel


def gradients(layer: nn.Conv2d, maps: Tensor) -> list[Tensor]:
    maps = maps.detach().requires_grad_()
    layer.zero_grad()
    layer(maps).sin().sum().backward()
    return [maps.grad, layer.weight.grad, layer.bias.grad]


def plain(layer: DepthwiseConv2d) -> nn.Conv2d:
    channels = layer.in_channels
    other = nn.Conv2d(channels, channels, layer.kernel_size, padding=layer.padding, groups=channels)
    other.load_state_dict(layer.state_dict())
    return other


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    size=st.sampled_from([1, 3, 7]),
    last=st.booleans(),
    sums=st.sampled_from([1, 2000, 2**20]),
)
def test_gradients_equal_torch_for_any_shape_and_layout(shape, size, last, sums):
    torch.manual_seed(0)
    layer, maps = DepthwiseConv2d(shape[1], size), torch.randn(shape)
    maps = maps.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    before, depthwise._SUMS_BYTES = depthwise._SUMS_BYTES, sums
    try:
        found = gradients(layer, maps)
    finally:
        depthwise._SUMS_BYTES = before
    for ours, theirs in zip(found, gradients(plain(layer), maps), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_tower_gradients_equal_the_stock_tower():
    torch.manual_seed(0)
    config = ConvLlavaVisionConfig(depths=[1] * 5, hidden_sizes=[8, 12, 16, 20, 24], layer_scale_init_value=0.5)
    model, stock = ConvLlavaVisionModel(config).train(), encoders.stock_convnext(config).train()
    stock.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(2, 3, 128, 192)
    model(image).last_hidden_state.square().mean().backward()
    stock.encoder(stock.embeddings(image)).last_hidden_state.square().mean().backward()
    expected = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_use_the_gradient_of_torch(dtype, monkeypatch):
    monkeypatch.setattr(depthwise, "weight_gradient", None)
    layer = DepthwiseConv2d(4, 7).to(dtype)
    assert gradients(layer, torch.randn(1, 4, 8, 8, dtype=dtype))[1].dtype == dtype


def test_frozen_convolution_passes_gradients_to_its_input():
    layer = DepthwiseConv2d(4, 7).requires_grad_(False)
    maps = torch.randn(1, 4, 8, 8, requires_grad=True)
    layer(maps).sum().backward()
    assert layer.weight.grad is None
    assert maps.grad is not None


def test_trained_weights_use_our_gradient(monkeypatch):
    calls = []
    original = depthwise.weight_gradient
    monkeypatch.setattr(depthwise, "weight_gradient", lambda *a: calls.append(1) or original(*a))
    gradients(DepthwiseConv2d(4, 7), torch.randn(1, 4, 8, 8))
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_in_full_precision(dtype):
    layer = DepthwiseConv2d(4, 7)
    maps = torch.randn(2, 4, 8, 12).to(dtype)
    expected = gradients(layer, maps.float())
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            held_out = layer(maps)
        found = layer(maps.requires_grad_())
    assert held_out.equal(found)
    assert found.dtype == torch.float32
    layer.zero_grad()
    found.sin().sum().backward()
    for own, other in zip([maps.grad, layer.weight.grad, layer.bias.grad], expected, strict=True):
        torch.testing.assert_close(own, other.to(own.dtype))
