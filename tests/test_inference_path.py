"""The vision tower without gradients, in place and in bands, equals the training path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convllava import ConvLlavaVisionConfig, ConvLlavaVisionModel, InputError
from convllava.model import inplace, streaming

SIZES = [(64, 64), (128, 320), (320, 64), (384, 256), (64, 64), (64, 64)]


def tower(depths: tuple[int, ...] = (2, 1, 3, 2, 1)) -> ConvLlavaVisionModel:
    torch.manual_seed(0)
    widths = (8, 12, 16, 20, 24, 28)[: len(depths)]
    config = ConvLlavaVisionConfig(depths=depths, hidden_sizes=widths, layer_scale_init_value=0.5)
    model = ConvLlavaVisionModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def images(sizes=SIZES) -> list[Tensor]:
    return [torch.randn(3, *size, generator=torch.Generator().manual_seed(sum(size))) for size in sizes]


def training_output(model: ConvLlavaVisionModel, batch: list[Tensor]) -> Tensor:
    with torch.enable_grad():
        return model(batch).last_hidden_state.detach()


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.fixture
def small_parts(monkeypatch):
    """Make parts so small that every image is cut into many."""
    monkeypatch.setitem(inplace._STRIP_BYTES, "cpu", 20_000)
    monkeypatch.setitem(inplace._HIDDEN_BYTES, "cpu", 1000)
    monkeypatch.setattr(inplace, "_MIN_ROWS", 50)
    monkeypatch.setattr(streaming, "_MIN_PIXELS", 1)
    monkeypatch.setitem(streaming._SLICE_BYTES, "cpu", 1000)


@torch.no_grad()
def test_in_place_equals_the_training_path():
    model = tower()
    assert_close(model(images()).last_hidden_state, training_output(model, images()))


@torch.no_grad()
def test_small_parts_equal_the_training_path(small_parts):
    model = tower()
    assert_close(model(images()).last_hidden_state, training_output(model, images()))
    assert_close(model(images(), band_rows=64).last_hidden_state, training_output(model, images()))


@torch.no_grad()
@pytest.mark.parametrize("depths", [(2, 1, 3, 2), (2, 1, 3, 2, 1), (1, 1, 2, 1, 1, 1)])
@pytest.mark.parametrize("strides", [1, 2, 9])
def test_bands_of_any_height_equal_the_training_path(depths, strides):
    model = tower(depths)
    batch = images([(512, 128), (256, 384), (1024, 128)])
    found = model(batch, band_rows=strides * model.config.stride)
    assert_close(found.last_hidden_state, training_output(model, batch))
    assert found.grids == tuple(
        (image.shape[1] // model.config.stride, image.shape[2] // model.config.stride) for image in batch
    )


@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(1, 60), min_size=0, max_size=6),
    tall=st.integers(1, 5),
    known=st.booleans(),
    few=st.booleans(),
)
def test_rows_in_any_portions_equal_the_training_path(cuts, tall, known, few):
    model = tower()
    (image,) = images([(64 * tall, 64)])
    places = sorted({4 * cut for cut in cuts if 4 * cut < image.shape[1]})
    bands = [image[:, a:b] for a, b in zip([0, *places], [*places, image.shape[1]], strict=True)]
    before = streaming._MIN_PIXELS
    streaming._MIN_PIXELS = 1 if few else before
    try:
        found = torch.cat(list(model.stream(bands, image.shape[1] if known else None)))
    finally:
        streaming._MIN_PIXELS = before
    assert_close(found.flatten(0, 1), training_output(model, [image]))


@torch.no_grad()
def test_large_image_of_a_batch_is_streamed_automatically(monkeypatch):
    model = tower()
    monkeypatch.setattr(streaming, "WHOLE_PIXELS", 100 * 1000)
    monkeypatch.setattr(streaming, "_BAND_PIXELS", 40 * 1000)
    batch = images([(64, 64), (512, 256), (128, 128), (64, 128)])
    streamed = []
    monkeypatch.setattr(
        streaming, "_stream", lambda *a, original=streaming._stream: streamed.append(a[3]) or original(*a)
    )
    assert_close(model(batch).last_hidden_state, training_output(model, batch))
    assert streamed == [512]


@torch.no_grad()
def test_input_images_are_not_changed():
    model, batch = tower(), images()
    model(batch)
    assert all(image.equal(other) for image, other in zip(batch, images(), strict=True))


@torch.no_grad()
def test_bfloat16_features_are_close_to_float32():
    model = tower()
    expected = model(images()).last_hidden_state
    found = model.bfloat16()(images()).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_replaced_layer_is_called():
    class Doubled(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model = tower()
    layer = model.encoder.stages[2].layers[1]
    plain = layer.pwconv2
    layer.pwconv2 = Doubled(plain.in_features, plain.out_features)
    layer.pwconv2.load_state_dict(plain.state_dict())
    assert_close(model(images()).last_hidden_state, training_output(model, images()))


@pytest.mark.parametrize("gradients", [True, False])
def test_compiles_without_a_graph_break(gradients):
    model = tower((1, 1, 1, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(gradients):
        assert_close(compiled(images()).last_hidden_state.detach(), training_output(model, images()))


@pytest.mark.parametrize("rows", [0, 32, 100])
def test_invalid_band_height_is_rejected_with_a_valid_one(rows):
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=f"`band_rows` {rows} is too small or not a multiple.*; give (64|128)"),
    ):
        tower()(images(), band_rows=rows)


def test_bands_with_gradients_are_rejected():
    with pytest.raises(InputError, match="`band_rows` is for inference"):
        tower()(images(), band_rows=64)


@pytest.mark.parametrize(
    ("heights", "message"),
    [([64, 30], "a band of 30x64 pixels does not fit"), ([64, 32], "96 rows in all"), ([], "0 rows in all")],
)
def test_bands_that_do_not_fit_are_rejected(heights, message):
    with pytest.raises(InputError, match=message):
        list(tower().stream([torch.zeros(3, height, 64) for height in heights]))


@pytest.mark.parametrize(("height", "message"), [(64, "more rows than `height` 64"), (192, "128 rows in all; 192 are")])
def test_bands_that_contradict_the_height_are_rejected(height, message):
    with pytest.raises(InputError, match=message):
        list(tower().stream([torch.zeros(3, 64, 64)] * 2, height))


@pytest.mark.parametrize("height", [0, 40, 96])
def test_height_off_the_stride_is_rejected_before_reading(height):
    with pytest.raises(InputError, match=f"`height` {height} is not a multiple of the tower's stride 64"):
        tower().stream(iter(()), height)


@torch.no_grad()
def test_reader_may_reuse_one_buffer_for_all_bands():
    model = tower()
    (image,) = images([(256, 64)])
    buffer = torch.empty(3, 64, 64)

    def read():
        for band in image.split(64, dim=1):
            yield buffer.copy_(band)

    assert_close(torch.cat(list(model.stream(read()))).flatten(0, 1), training_output(model, [image]))


def test_hooks_run_and_prevent_streaming():
    model = tower()
    calls = []
    model.encoder.stages[1].layers[0].pwconv2.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(images())
        assert calls == [1]
        with pytest.raises(InputError, match="adapters or hooks"):
            model(images(), band_rows=64)
    with pytest.raises(InputError, match="cannot be streamed"):
        model.stream([torch.zeros(3, 64, 64)])


def test_bands_of_wrong_dimensions_are_rejected():
    with pytest.raises(InputError, match="got a tensor of 4 dimensions"):
        list(tower().stream([torch.zeros(1, 3, 64, 64)]))
    with torch.no_grad(), pytest.raises(InputError, match="got no image"):
        tower()([])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="cannot be streamed"):
        tower().stream([torch.zeros(3, 64, 64)])
    (image,) = images([(64, 64)])
    assert_close(
        torch.cat(list(tower().stream([image[:, :0], image, image[:, :0]]))).flatten(0, 1),
        training_output(tower(), [image]),
    )


@torch.no_grad()
def test_tower_with_relu_runs_in_place():
    model = ConvLlavaVisionModel(ConvLlavaVisionConfig(depths=[1] * 5, hidden_sizes=[8] * 5, hidden_act="relu")).eval()
    assert inplace.is_plain(model)
    assert_close(model(images()).last_hidden_state, training_output(model, images()))
