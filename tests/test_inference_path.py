"""The tower without gradients, in place and in bands: the same numbers as the path that trains."""

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


def trained(model: ConvLlavaVisionModel, batch: list[Tensor]) -> Tensor:
    with torch.enable_grad():
        return model(batch).last_hidden_state.detach()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts so small that every image is cut into many."""
    monkeypatch.setitem(inplace._STRIP_BYTES, "cpu", 20_000)
    monkeypatch.setitem(inplace._HIDDEN_BYTES, "cpu", 1000)
    monkeypatch.setattr(inplace, "_MIN_ROWS", 50)
    monkeypatch.setattr(streaming, "_MIN_PIXELS", 1)
    monkeypatch.setitem(streaming._SLICE_BYTES, "cpu", 1000)


@torch.no_grad()
def test_in_place_equals_the_path_that_trains():
    model = tower()
    close(model(images()).last_hidden_state, trained(model, images()))


@torch.no_grad()
def test_in_small_parts_equals_the_path_that_trains(small_parts):
    model = tower()
    close(model(images()).last_hidden_state, trained(model, images()))
    close(model(images(), band_rows=64).last_hidden_state, trained(model, images()))


@torch.no_grad()
@pytest.mark.parametrize("depths", [(2, 1, 3, 2), (2, 1, 3, 2, 1), (1, 1, 2, 1, 1, 1)])
@pytest.mark.parametrize("strides", [1, 2, 9])
def test_bands_of_any_height_and_towers_of_any_depth(depths, strides):
    model = tower(depths)
    batch = images([(512, 128), (256, 384), (1024, 128)])
    found = model(batch, band_rows=strides * model.config.stride)
    close(found.last_hidden_state, trained(model, batch))
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
def test_rows_may_come_in_any_portions(cuts, tall, known, few):
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
    close(found.flatten(0, 1), trained(model, [image]))


@torch.no_grad()
def test_a_large_image_is_streamed_unasked_and_in_its_place(monkeypatch):
    model = tower()
    monkeypatch.setattr(streaming, "WHOLE_PIXELS", 100 * 1000)
    monkeypatch.setattr(streaming, "_BAND_PIXELS", 40 * 1000)
    batch = images([(64, 64), (512, 256), (128, 128), (64, 128)])
    streamed = []
    monkeypatch.setattr(
        streaming, "_stream", lambda *a, original=streaming._stream: streamed.append(a[3]) or original(*a)
    )
    close(model(batch).last_hidden_state, trained(model, batch))
    assert streamed == [512]


@torch.no_grad()
def test_the_images_are_left_as_they_were():
    model, batch = tower(), images()
    model(batch)
    assert all(image.equal(other) for image, other in zip(batch, images(), strict=True))


@torch.no_grad()
def test_bfloat16_is_as_near_as_bfloat16_can_be():
    model = tower()
    expected = model(images()).last_hidden_state
    found = model.bfloat16()(images()).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_a_layer_that_is_no_longer_plain_is_called_as_it_is():
    class Doubled(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model = tower()
    layer = model.encoder.stages[2].layers[1]
    plain = layer.pwconv2
    layer.pwconv2 = Doubled(plain.in_features, plain.out_features)
    layer.pwconv2.load_state_dict(plain.state_dict())
    close(model(images()).last_hidden_state, trained(model, images()))


@pytest.mark.parametrize("gradients", [True, False])
def test_compiles_without_a_graph_break(gradients):
    model = tower((1, 1, 1, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(gradients):
        close(compiled(images()).last_hidden_state.detach(), trained(model, images()))


@pytest.mark.parametrize("rows", [0, 32, 100])
def test_a_band_that_is_too_small_names_a_better_one(rows):
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=f"`band_rows` {rows} is too small or no multiple.*; give (64|128)"),
    ):
        tower()(images(), band_rows=rows)


def test_bands_are_for_inference():
    with pytest.raises(InputError, match="`band_rows` is for inference"):
        tower()(images(), band_rows=64)


@pytest.mark.parametrize(
    ("heights", "message"),
    [([64, 30], "a band of 30x64 pixels does not fit"), ([64, 32], "96 rows in all"), ([], "0 rows in all")],
)
def test_bands_that_do_not_fit_are_refused(heights, message):
    with pytest.raises(InputError, match=message):
        list(tower().stream([torch.zeros(3, height, 64) for height in heights]))


@pytest.mark.parametrize(("height", "message"), [(64, "more rows than `height` 64"), (192, "128 rows in all; 192 are")])
def test_bands_of_another_height_than_was_said_are_refused(height, message):
    with pytest.raises(InputError, match=message):
        list(tower().stream([torch.zeros(3, 64, 64)] * 2, height))


@pytest.mark.parametrize("height", [0, 40, 96])
def test_a_height_that_the_tower_cannot_halve_is_refused_before_a_band_is_read(height):
    with pytest.raises(InputError, match=f"`height` {height} is no multiple of the tower's stride 64"):
        tower().stream(iter(()), height)


@torch.no_grad()
def test_a_reader_may_use_one_buffer_for_all_bands():
    model = tower()
    (image,) = images([(256, 64)])
    buffer = torch.empty(3, 64, 64)

    def read():
        for band in image.split(64, dim=1):
            yield buffer.copy_(band)

    close(torch.cat(list(model.stream(read()))).flatten(0, 1), trained(model, [image]))


def test_hooks_run_and_are_not_streamed_past():
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


def test_bands_of_another_form_are_refused():
    with pytest.raises(InputError, match="got a tensor of 4 dimensions"):
        list(tower().stream([torch.zeros(1, 3, 64, 64)]))
    with torch.no_grad(), pytest.raises(InputError, match="got no image"):
        tower()([])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="cannot be streamed"):
        tower().stream([torch.zeros(3, 64, 64)])
    (image,) = images([(64, 64)])
    close(torch.cat(list(tower().stream([image[:, :0], image, image[:, :0]]))).flatten(0, 1), trained(tower(), [image]))


def test_an_activation_of_torch_goes_in_place():
    tower = ConvLlavaVisionModel(ConvLlavaVisionConfig(depths=[1] * 5, hidden_sizes=[8] * 5, hidden_act="relu")).eval()
    assert inplace.is_plain(tower)
