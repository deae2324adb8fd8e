"""The vision tower equals the stock ConvNeXt, and a batch of mixed shapes equals its single images."""

from __future__ import annotations

import pytest
import torch
from transformers import ConvNextConfig, ConvNextModel

from convllava import ConvLlavaVisionConfig, ConvLlavaVisionModel, InputError

SIZES = [(64, 192), (128, 64), (128, 64), (64, 64), (192, 128)]


def tower(depths=(1, 1, 2, 1, 1), widths=(8, 16, 16, 24, 32)):
    torch.manual_seed(0)
    config = ConvLlavaVisionConfig(depths=depths, hidden_sizes=widths, layer_scale_init_value=0.5)
    return ConvLlavaVisionModel(config).eval()


def images(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


@pytest.mark.parametrize("depths", [(1, 1, 2, 1), (1, 1, 2, 1, 1), (1, 1, 1, 1, 1, 1)])
def test_tower_equals_the_stock_convnext_with_its_weights(depths):
    widths = (8, 16, 16, 24, 32, 32)[: len(depths)]
    ours = tower(depths, widths)
    stock = ConvNextModel(
        ConvNextConfig(num_stages=len(depths), depths=depths, hidden_sizes=widths, layer_scale_init_value=0.5)
    ).eval()
    report = stock.load_state_dict(ours.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert report.missing_keys == ["layernorm.weight", "layernorm.bias"]
    pixels = torch.randn(2, 3, 256, 128)
    expected = stock(pixels).last_hidden_state.permute(0, 2, 3, 1)
    for found, target in zip(ours(pixels).maps(), expected, strict=True):
        torch.testing.assert_close(found, target, atol=1e-4, rtol=0)


def test_batched_mixed_shapes_equal_single():
    model = tower()
    batch = images()
    for found, image in zip(model(batch).maps(), batch, strict=True):
        torch.testing.assert_close(found, model(image[None]).maps()[0], atol=1e-4, rtol=0)


def test_padding_does_not_change_the_features():
    model = tower()
    padded = torch.full((len(SIZES), 3, 192, 192), 1e6)
    for canvas, image in zip(padded, images(), strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    found = model(padded, torch.tensor(SIZES)).last_hidden_state
    torch.testing.assert_close(found, model(images()).last_hidden_state)


def test_gradients_equal_the_stock_convnext():
    ours = tower()
    config = ours.config
    stock = ConvNextModel(
        ConvNextConfig(num_stages=5, depths=config.depths, hidden_sizes=config.hidden_sizes, layer_scale_init_value=0.5)
    )
    stock.load_state_dict(ours.state_dict(), strict=False)
    pixels = torch.randn(2, 3, 128, 64)
    weights = torch.randn(2, 2, 1, 32)
    (torch.stack(ours.train()(pixels).maps()) * weights).sum().backward()
    (stock(pixels).last_hidden_state.permute(0, 2, 3, 1) * weights).sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_gradient_checkpointing_reruns_blocks_with_equal_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tower().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = []
        model.encoder.stages[2].layers[0].dwconv.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(images()).last_hidden_state.square().sum().backward()
        assert len(calls) == (8 if checkpointing else 4)  # four runs of equal shapes in the batch
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_side_off_the_stride_is_rejected_with_the_nearest_size():
    with pytest.raises(InputError, match=r"100x130 pixels.*stride 64.*128x128"):
        tower()(torch.zeros(1, 3, 100, 130))


def test_fewer_than_four_stages_are_rejected():
    with pytest.raises(Exception, match="four or more stages"):
        ConvLlavaVisionConfig(depths=(1, 1, 1), hidden_sizes=(8, 8, 8))


def test_stride_depends_on_the_number_of_stages():
    assert tower().config.stride == 64
    assert tower((1, 1, 1, 1, 1, 1), (8,) * 6).config.stride == 128
