"""Pixels for the vision tower: equal to the official ones bit for bit, in batches of any shapes, after saving."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from convllava.errors import InputError
from convllava.geometry import Size, crop, square, visual_tokens
from convllava.model.image_processing import ConvLlavaImageProcessorPil, mean_colour, render

OFFICIAL = Path(__file__).parent / "data" / "official" / "images" / "square.png"
OFFICIAL_PIXELS_SHA256 = "cc4adbdd40b7a83be9f154582ff2b84f88c196c8695bfc4abd8de06e8f91e66d"
"""Digest of the float32 (1, 3, 256, 256) that the original code (commit 3e7ae57) makes from square.png."""
BACKGROUND = (122, 116, 104)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def expand2square(image: Image.Image) -> Image.Image:
    """Pad as LLaVA does: paste the image into the whole square."""
    long = max(image.size)
    result = Image.new("RGB", (long, long), BACKGROUND)
    result.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
    return result


def normalised(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((values - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["square", "crop"])
def test_official_pixels_bit_for_bit(mode: str) -> None:
    processor = ConvLlavaImageProcessorPil(mode=mode, side=256)
    pixel_values = processor(OFFICIAL, return_tensors="np")["pixel_values"]
    assert pixel_values.dtype == np.float32
    assert pixel_values.shape == (1, 3, 256, 256)
    assert hashlib.sha256(pixel_values.tobytes()).hexdigest() == OFFICIAL_PIXELS_SHA256


@pytest.mark.parametrize(("height", "width"), [(250, 401), (401, 250), (900, 611), (3, 500), (500, 3), (40, 41)])
def test_square_is_pad_and_resize_bit_for_bit(height: int, width: int) -> None:
    image = noise(height, width)
    expected = expand2square(image).resize((256, 256), Image.Resampling.BICUBIC)
    processor = ConvLlavaImageProcessorPil(mode="square", side=256)
    assert np.array_equal(processor(image)["pixel_values"][0], normalised(expected))


@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from([64, 320]), st.integers(0, 9))
def test_resizing_in_strips_equals_resizing_at_once(height: int, width: int, side: int, seed: int) -> None:
    if max(height, width) > 200 * min(height, width):
        height = width
    image = noise(height, width, seed)
    rendered = render(image, square(Size(height, width), side=side), Image.Resampling.BICUBIC, BACKGROUND)
    expected = expand2square(image).resize((side, side), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(rendered), np.asarray(expected))


def test_long_image_is_padded_in_little_memory() -> None:
    """The padded square would have 1.4 gigapixels."""
    image = Image.new("RGB", (38000, 200), "red")
    rendered = render(image, square(Size(200, 38000), side=64), Image.Resampling.BICUBIC, BACKGROUND)
    assert rendered.size == (64, 64)
    assert rendered.getpixel((32, 0)) == BACKGROUND


@pytest.mark.parametrize(("height", "width"), [(250, 401), (401, 250), (40, 333)])
def test_crop_is_resize_and_centre_crop_bit_for_bit(height: int, width: int) -> None:
    image = noise(height, width)
    placement = crop(Size(height, width), side=128)
    resized = image.resize(placement.resized[::-1], Image.Resampling.BICUBIC)
    top, left = (resized.height - 128) // 2, (resized.width - 128) // 2
    expected = resized.crop((left, top, left + 128, top + 128))
    processor = ConvLlavaImageProcessorPil(mode="crop", side=128)
    assert np.array_equal(processor(image)["pixel_values"][0], normalised(expected))


def test_native_resizes_to_the_canvas() -> None:
    image = noise(250, 401)
    output = ConvLlavaImageProcessorPil()(image)
    assert output["image_sizes"].tolist() == [[256, 384]]
    expected = image.resize((384, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(output["pixel_values"][0], normalised(expected))


@pytest.mark.parametrize("mode", ["native", "short_side"])
def test_unequal_images_are_padded_with_zeros_and_keep_their_sizes(mode: str) -> None:
    processor = ConvLlavaImageProcessorPil(mode=mode, side=128)
    images = [noise(130, 260), noise(300, 128), noise(190, 200)]
    batch = processor(images, return_tensors="np")
    sizes = batch["image_sizes"]
    assert sizes.dtype == np.int64
    assert batch["pixel_values"].dtype == np.float32
    assert batch["pixel_values"].shape == (3, 3, *sizes.max(axis=0))
    for image, (height, width), pixels in zip(images, sizes, batch["pixel_values"], strict=True):
        assert np.array_equal(pixels[:, :height, :width], processor(image)["pixel_values"][0])
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()


def test_torch_and_numpy_outputs_are_equal() -> None:
    processor = ConvLlavaImageProcessorPil()
    images = [noise(130, 260), noise(300, 128)]
    arrays, tensors, plain = (processor(images, return_tensors=kind) for kind in ("np", "pt", None))
    for name, dtype in (("pixel_values", torch.float32), ("image_sizes", torch.int64)):
        assert tensors[name].dtype == dtype
        assert np.array_equal(tensors[name].numpy(), arrays[name])
        assert np.array_equal(np.asarray(plain[name]), arrays[name])


def test_all_sources_and_nestings_give_the_same_pixels(tmp_path: Path) -> None:
    image = noise(128, 192)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    sources = [image, str(tmp_path / "a.png"), tmp_path / "a.png", array, array.transpose(2, 0, 1), tensor]
    processor = ConvLlavaImageProcessorPil()
    expected = processor(image)["pixel_values"][0]
    for images in (sources, [sources[:2], [], sources[2:]], np.stack([array] * 6), torch.stack([tensor] * 6)):
        pixel_values = processor(images)["pixel_values"]
        assert pixel_values.shape[0] == 6
        assert (pixel_values == expected).all()


def test_channel_axis_is_guessed_or_given() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 64, 3), dtype=np.uint8)
    processor = ConvLlavaImageProcessorPil()
    last = processor(Image.fromarray(array))["pixel_values"]
    assert np.array_equal(processor(array)["pixel_values"], last)
    first = processor(Image.fromarray(array.transpose(1, 2, 0)))["pixel_values"]
    assert np.array_equal(processor(array, input_data_format="channels_first")["pixel_values"], first)
    assert np.array_equal(processor(torch.from_numpy(array))["pixel_values"], first)


def test_transparent_images_become_white() -> None:
    output = ConvLlavaImageProcessorPil(do_normalize=False)(Image.new("RGBA", (64, 64), (255, 0, 0, 0)))
    assert (output["pixel_values"] == 1).all()


def test_fetch_images_decodes_files_and_rejects_urls(tmp_path: Path) -> None:
    processor = ConvLlavaImageProcessorPil()
    noise(4, 5).save(tmp_path / "a.png")
    nested = processor.fetch_images([[str(tmp_path / "a.png")], [np.zeros((4, 5), np.uint8)]])
    assert [[image.size for image in images] for images in nested] == [[(5, 4)], [(5, 4)]]
    with pytest.raises(InputError, match="download it first"):
        processor.fetch_images("https://example.com/a.png")


def test_settings_of_a_call_override_the_processor() -> None:
    processor = ConvLlavaImageProcessorPil()
    image = noise(250, 401)
    assert processor(image, mode="square", side=128)["image_sizes"].tolist() == [[128, 128]]
    assert processor(image, max_pixels=2 * 64**2, min_pixels=1)["image_sizes"].tolist() == [[64, 128]]
    assert processor(image, stride=32)["image_sizes"].tolist() == [[256, 416]]
    raw = processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
    assert np.array_equal(raw[0], np.asarray(image.resize((384, 256), Image.Resampling.BICUBIC)).transpose(2, 0, 1))
    assert processor(image)["image_sizes"].tolist() == [[256, 384]]


def test_without_resizing_sides_must_be_multiples_of_the_stride() -> None:
    processor = ConvLlavaImageProcessorPil(do_resize=False)
    image = noise(64, 128)
    assert np.array_equal(processor(image)["pixel_values"][0], normalised(image))
    with pytest.raises(InputError, match="make both sides multiples of the stride 64"):
        processor(noise(64, 100))


@pytest.mark.parametrize("mode", ["native", "square", "short_side", "crop"])
def test_placement_and_patches_equal_the_output(mode: str) -> None:
    processor = ConvLlavaImageProcessorPil(mode=mode, side=192)
    size = Size(250, 401)
    canvas = processor.placement(size).canvas
    assert processor(noise(*size))["image_sizes"].tolist() == [list(canvas)]
    assert processor.get_number_of_image_patches(*size) == visual_tokens(canvas, 64)
    override = {"mode": "square", "side": 128, "stride": 32, "size": None, "do_normalize": True}
    assert processor.get_number_of_image_patches(*size, override) == 16


@pytest.mark.parametrize("mode", ["native", "square", "short_side", "crop"])
@given(
    size=st.builds(Size, st.integers(20, 900), st.integers(20, 900)),
    pixels=st.integers(64**2, 640**2),
)
def test_within_a_budget_no_canvas_has_more_pixels(mode: str, size: Size, pixels: int) -> None:
    processor = ConvLlavaImageProcessorPil(mode=mode, side=640, min_pixels=256**2, max_pixels=640**2)
    assert processor.budget == 640**2
    canvas = processor.placement(size, **processor.within(pixels)).canvas
    assert canvas.height * canvas.width <= pixels
    assert processor.placement(size, **processor.within(processor.budget)) == processor.placement(size)
    with pytest.raises(InputError, match="`max_pixels` 4095 is less than one visual token; give at least 4096"):
        processor.within(64**2 - 1)


def test_background_is_the_mean_colour() -> None:
    assert mean_colour(ConvLlavaImageProcessorPil().image_mean) == BACKGROUND
    assert mean_colour(0.5) == (127, 127, 127)


class ConfigOfATest(PreTrainedConfig):
    model_type = "convllava_image_processing_test"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register only the image processor, for one test; the package registers it permanently."""
    monkeypatch.setattr(IMAGE_PROCESSOR_MAPPING, "_extra_content", {})
    AutoImageProcessor.register(ConfigOfATest, image_processor_classes={"pil": ConvLlavaImageProcessorPil})


@pytest.mark.usefixtures("registered")
def test_saved_and_loaded_by_the_auto_class(tmp_path: Path) -> None:
    settings = {
        "mode": "square",
        "side": 320,
        "stride": 32,
        "max_pixels": 999999,
        "image_mean": (0.5, 0.25, 0.75),
    }
    processor = ConvLlavaImageProcessorPil(**settings)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ConvLlavaImageProcessorPil
    assert loaded.to_dict() == processor.to_dict()
    assert {name: getattr(loaded, name) for name in settings} == settings
    image = noise(250, 401)
    assert np.array_equal(loaded(image)["pixel_values"], processor(image)["pixel_values"])
    assert AutoImageProcessor.from_pretrained(tmp_path, side=64).side == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "squared"}, "unknown image mode 'squared'; choose one of native, square, short_side, crop"),
        ({"mode": "square", "side": 100}, "multiples of the stride 64"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "more than `max_pixels`"),
        ({"size": {"shortest_edge": 336}}, "has no size; set mode"),
        ({"crop_size": {"height": 336, "width": 336}}, "has no crop_size"),
        ({"do_center_crop": True}, "has no do_center_crop"),
        ({"do_pad": True}, "has no do_pad"),
        ({"do_convert_rgb": False}, "takes RGB only"),
        ({"data_format": "channels_last"}, "channels first"),
    ],
)
def test_impossible_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConvLlavaImageProcessorPil(**settings)
    with pytest.raises(InputError, match=message):
        ConvLlavaImageProcessorPil()(noise(9, 9), **settings)


def test_smaller_max_pixels_lowers_min_pixels() -> None:
    processor = ConvLlavaImageProcessorPil(min_pixels=640**2, max_pixels=1024**2)
    processor.change(max_pixels=256**2)
    assert processor.placement(Size(256, 256)).canvas == Size(256, 256)
    processor.change(max_pixels=512**2)
    assert processor.min_pixels == 256**2
    with pytest.raises(InputError, match="more than `max_pixels`"):
        processor.change(min_pixels=640**2, max_pixels=256**2)


def test_empty_list_and_missing_file_are_rejected() -> None:
    processor = ConvLlavaImageProcessorPil()
    with pytest.raises(InputError, match="the list of images is empty"):
        processor([])
    with pytest.raises(InputError, match="no such file"):
        processor([noise(9, 9), "/nowhere.png"])


def test_metadata_does_not_change_the_size():
    info = PngImagePlugin.PngInfo()
    info.add_text("original_size", "640x480")
    file = io.BytesIO()
    picture = Image.fromarray(np.zeros((80, 100, 3), dtype=np.uint8))
    picture.save(file, "PNG", pnginfo=info)
    plain = ConvLlavaImageProcessorPil(mode="native")
    assert plain(file.getvalue())["image_sizes"].tolist() == plain(picture)["image_sizes"].tolist()
