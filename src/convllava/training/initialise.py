"""The model that a recipe starts from: a checkpoint, pretrained parts with a new fifth stage, or a new model."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from convllava import checkpoints
from convllava.checkpoints.assembly import STAGE5_DEPTH, build, build_processor
from convllava.checkpoints.inspection import configuration_of
from convllava.errors import ConfigError, InputError, nearest
from convllava.io import one_line
from convllava.model.builder import Parts, build_fresh
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration, coordinate_features
from convllava.model.presets import presets
from convllava.model.processing import ConvLlavaProcessor
from convllava.synthetic import closed_vocabulary
from convllava.training.distributed import is_first_process
from convllava.training.recipe import ModelSpec, Recipe

TOKEN_RMS = 1.0
"""Root mean square of a visual token; a layer of the language model adds values of about this size."""


def initial_model(recipe: Recipe) -> Parts:
    """Return model and processor before the first stage. For pretrained parts a table of the new weights is printed.

    Raises:
        InputError: if a part is missing, or does not fit the others or the preset.
    """
    spec = recipe.model
    if spec.checkpoint is not None:
        return checkpoints.read(checkpoints.find(spec.checkpoint))
    if spec.vision_from is None or spec.language_from is None:
        return _new_model(spec, recipe.seed)
    depths = _preset(spec).get("vision", {}).get("depths", [])
    assembly = build(
        vision=spec.vision_from,
        language=spec.language_from,
        stage5_depth=depths[4] if len(depths) > 4 else STAGE5_DEPTH,
        pixels=_pixel_settings(spec),
        row_separator=spec.has_row_separator,
        coordinate_embedding=spec.has_coordinate_embedding,
        seed=recipe.seed,
    )
    if spec.preset is not None:
        check_preset(spec.preset, assembly.model.config)
    if is_first_process():
        Console().print(assembly.table())
    return assembly.model, assembly.processor


def model_without_weights(recipe: Recipe) -> ConvLlavaForConditionalGeneration:
    """Return the model before the first stage on the meta device. The parts of a preset need not exist.

    Raises:
        InputError: see `initial_model`.
    """
    spec = recipe.model
    _preset(spec)
    with torch.device("meta"):
        if name := spec.preset or spec.checkpoint:
            config = configuration_of(name)
            if spec.preset is not None:
                config.row_separator = spec.has_row_separator
                config.coordinate_embedding = spec.has_coordinate_embedding
            return ConvLlavaForConditionalGeneration(config)
        if spec.vision_from is None:
            return _new_model(spec, recipe.seed)[0]
    return initial_model(recipe)[0]


def initial_processor(recipe: Recipe) -> ConvLlavaProcessor:
    """Return the processor before the first stage, without loading weights.

    Raises:
        InputError: if the checkpoint or tokenizer does not exist.
    """
    spec = recipe.model
    if spec.checkpoint is not None:
        return checkpoints.processor(checkpoints.find(spec.checkpoint))
    if spec.language_from is not None:
        return build_processor(spec.language_from, pixels=_pixel_settings(spec), row_separator=spec.has_row_separator)
    with torch.device("meta"):
        return _new_model(spec, recipe.seed)[1]


def initial_image_processor(recipe: Recipe) -> ConvLlavaImageProcessorPil:
    """Return the image processor before the first stage. The tokenizer need not exist.

    Raises:
        InputError: if the checkpoint does not exist, or `model.pixels` is bad.
    """
    spec = recipe.model
    if spec.checkpoint is not None:
        return checkpoints.processor(checkpoints.find(spec.checkpoint)).image_processor
    return ConvLlavaImageProcessorPil(**_pixel_settings(spec))


def _new_model(spec: ModelSpec, seed: int) -> Parts:
    """Return a model with random weights.

    Raises:
        ConfigError: if a setting does not exist; the configurations would silently ignore it.
    """
    family = spec.language.get("model_type", "llama")
    if family not in CONFIG_MAPPING:
        raise ConfigError(f"model.language: transformers knows no model_type {family!r}")
    _check_known("model.vision", spec.vision, ConvLlavaVisionConfig)
    _check_known("model.language", spec.language, CONFIG_MAPPING[family])
    _check_known("model.pixels", spec.pixels, ConvLlavaImageProcessorPil)
    return build_fresh(
        vision=spec.vision,
        language=spec.language,
        pixels=spec.pixels,
        words=closed_vocabulary(),
        row_separator=spec.has_row_separator,
        coordinate_embedding=spec.has_coordinate_embedding,
        seed=seed,
    )


def _preset(spec: ModelSpec) -> dict[str, Any]:
    """Return the settings of the published architecture that a recipe names; empty without a name.

    Raises:
        ConfigError: if there is no such architecture.
    """
    known = presets()
    if spec.preset is not None and spec.preset not in known:
        raise ConfigError(f"model.preset: there is no architecture {spec.preset!r}; choose one of {', '.join(known)}")
    return known.get(spec.preset or "", {})


def check_preset(name: str, config: ConvLlavaConfig) -> None:
    """Check that assembled parts have the architecture of a preset.

    Raises:
        ConfigError: if they do not; the message names the first setting that differs.
    """
    preset = configuration_of(name)
    for section, keys in (
        ("vision_config", ("depths", "hidden_sizes")),
        ("text_config", ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")),
    ):
        for key in keys:
            found, expected = (getattr(getattr(one, section), key) for one in (config, preset))
            if found != expected:
                raise ConfigError(f"model: {name} has {key} {expected}, but the given parts have {found}")


def _pixel_settings(spec: ModelSpec) -> dict[str, Any]:
    """Return the settings of the image processor: those of the preset, or the recipe's own.

    Raises:
        ConfigError: if a setting does not exist or has a bad value.
    """
    settings = _preset(spec).get("pixels") or spec.pixels
    _check_known("model.pixels", settings, ConvLlavaImageProcessorPil)
    try:
        ConvLlavaImageProcessorPil(**settings)
    except (InputError, TypeError) as error:
        raise ConfigError(f"model.pixels: {one_line(error)}") from None
    return settings


def _check_known(where: str, settings: Mapping[str, Any], kind: type) -> None:
    """Check that a configuration or image processor has all settings.

    Raises:
        ConfigError: if it does not; the message names the nearest known setting.
    """
    known = set(dir(kind)) | set(inspect.signature(kind).parameters)
    for key in settings:
        if key not in known:
            raise ConfigError(f"{where}: there is no setting {key!r}{nearest(key, known)}")


@torch.no_grad()
def calibrate(model: ConvLlavaForConditionalGeneration, images: list[Tensor]) -> None:
    """Centre and scale the outputs of the parts that stage 1 adds, on images of (3, height, width).

    The features of a trained tower have a large common part. After new random layers, the language model would see
    visual tokens that hardly differ, and a small model takes thousands of steps to ignore the common part. So the last
    stage of the tower and the projector are shifted and scaled on a few pages until tokens have mean zero and a common
    size, similar to layer-sequential unit-variance initialisation (arXiv 1511.06422).
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    pixels, grids = tower.embeddings(images)
    *trained, new = tower.encoder.stages
    for stage in trained:
        pixels, grids = stage(pixels, grids)
    norm = new.downsampling_layer[0]
    norm.bias -= norm(pixels).mean(0)
    features, grids = new(pixels, grids)
    _standardise(projector.linear_1, features, 1.0)
    _standardise(projector.linear_2, projector.act(projector.linear_1(features)), TOKEN_RMS)
    if projector.coordinates is not None:
        places = torch.cat([coordinate_features(grid, features.device) for grid in grids])
        projector.coordinates.weight *= TOKEN_RMS / _rms(projector.coordinates(places))
    if projector.row_separator is not None:
        projector.row_separator *= TOKEN_RMS / _rms(projector.row_separator)


def _standardise(layer: nn.Linear, inputs: Tensor, rms: float) -> None:
    """Change the layer so that each output has mean zero on these inputs, and the outputs have this root mean
    square."""
    outputs = layer(inputs) - layer.bias
    outputs -= outputs.mean(0)
    layer.weight *= rms / _rms(outputs)
    layer.bias.copy_(-(inputs @ layer.weight.T).mean(0))


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
