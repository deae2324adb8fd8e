"""The model that the first stage of a recipe receives."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from transformers import CONFIG_MAPPING

from convllava import checkpoints
from convllava.checkpoints.assembly import STAGE5_DEPTH, build, build_processor
from convllava.checkpoints.inspection import configuration_of
from convllava.errors import InputError, nearest
from convllava.io import one_line
from convllava.model.builder import Parts, build_fresh
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.presets import presets
from convllava.model.processing import ConvLlavaProcessor
from convllava.synthetic import closed_vocabulary
from convllava.training.distributed import is_first_process
from convllava.training.recipe import ModelSpec, Recipe


def start(recipe: Recipe) -> Parts:
    """The model that the first stage receives.

    Raises:
        InputError: a part is missing, or does not fit the others or the preset.
    """
    spec = recipe.model
    if spec.checkpoint is not None:
        return checkpoints.read(checkpoints.find(spec.checkpoint))
    if spec.vision_from is not None and spec.language_from is not None:
        return _assemble(spec, recipe.seed)
    return _fresh(spec, recipe.seed)


def outline(recipe: Recipe) -> ConvLlavaForConditionalGeneration:
    """The same model without its weights, on the meta device; of a preset the parts need not be there.

    Raises:
        InputError: as `start`.
    """
    spec = recipe.model
    preset_of(spec)
    with torch.device("meta"):
        if name := spec.preset or spec.checkpoint:
            config = configuration_of(name)
            if spec.preset is not None:
                config.row_separator = spec.has_row_separator
                config.coordinate_embedding = spec.has_coordinate_embedding
            return ConvLlavaForConditionalGeneration(config)
        if spec.vision_from is None:
            return _fresh(spec, recipe.seed)[0]
    return start(recipe)[0]


def processor_of(recipe: Recipe) -> ConvLlavaProcessor:
    """The processor that the first stage receives, without the model's weights.

    Raises:
        InputError: there is no checkpoint or tokenizer.
    """
    spec = recipe.model
    if spec.checkpoint is not None:
        return checkpoints.processor(checkpoints.find(spec.checkpoint))
    if spec.language_from is not None:
        return build_processor(spec.language_from, pixels=_pixels_of(spec), row_separator=spec.has_row_separator)
    with torch.device("meta"):
        return _fresh(spec, recipe.seed)[1]


def _assemble(spec: ModelSpec, seed: int) -> Parts:
    """A pretrained encoder and language model; what is new is printed."""
    assert spec.vision_from is not None
    assert spec.language_from is not None
    preset = preset_of(spec)
    depths = preset.get("vision", {}).get("depths", [])
    assembly = build(
        vision=spec.vision_from,
        language=spec.language_from,
        stage5_depth=depths[4] if len(depths) > 4 else STAGE5_DEPTH,
        pixels=_pixels_of(spec),
        row_separator=spec.has_row_separator,
        coordinate_embedding=spec.has_coordinate_embedding,
        seed=seed,
    )
    if spec.preset is not None:
        check_preset(spec.preset, assembly.model.config)
    if is_first_process():
        Console().print(assembly.table())
    return assembly.model, assembly.processor


def preset_of(spec: ModelSpec) -> dict[str, Any]:
    """Settings of the published architecture that a recipe names; nothing where it names none.

    Raises:
        InputError: there is no such architecture.
    """
    known = presets()
    if spec.preset is not None and spec.preset not in known:
        raise InputError(f"model.preset: there is no architecture {spec.preset!r}; choose one of {', '.join(known)}")
    return known.get(spec.preset or "", {})


def check_preset(name: str, config: ConvLlavaConfig) -> None:
    """Refuse parts that are not of the architecture they were said to be.

    Raises:
        InputError: names the first setting that differs.
    """
    asked = configuration_of(name)
    for section, keys in (
        ("vision_config", ("depths", "hidden_sizes")),
        ("text_config", ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")),
    ):
        for key in keys:
            found, wanted = (getattr(getattr(one, section), key) for one in (config, asked))
            if found != wanted:
                raise InputError(f"model: {name} has {key} {wanted}, but what it is assembled from has {found}")


def _fresh(spec: ModelSpec, seed: int) -> Parts:
    check_settings(spec)
    return build_fresh(
        vision=spec.vision,
        language=spec.language,
        pixels=spec.pixels,
        words=closed_vocabulary(),
        row_separator=spec.has_row_separator,
        coordinate_embedding=spec.has_coordinate_embedding,
        seed=seed,
    )


def check_settings(spec: ModelSpec) -> None:
    """Refuse settings that the configurations do not have: they would be kept and have no effect.

    Raises:
        InputError: names the nearest known setting.
    """
    family = spec.language.get("model_type", "llama")
    if family not in CONFIG_MAPPING:
        raise InputError(f"model.language: transformers knows no model_type {family!r}")
    sections: dict[str, tuple[dict[str, Any], type]] = {
        "vision": (spec.vision, ConvLlavaVisionConfig),
        "language": (spec.language, CONFIG_MAPPING[family]),
        "pixels": (spec.pixels, ConvLlavaImageProcessorPil),
    }
    for section, (settings, kind) in sections.items():
        check_known(f"model.{section}", settings, kind)


def pixels_of(recipe: Recipe) -> ConvLlavaImageProcessorPil:
    """The image processor that the first stage receives, as far as it is known without the model."""
    spec = recipe.model
    if spec.checkpoint is not None:
        return checkpoints.processor(checkpoints.find(spec.checkpoint)).image_processor
    return ConvLlavaImageProcessorPil(**_pixels_of(spec))


def _pixels_of(spec: ModelSpec) -> dict[str, Any]:
    """Settings of the image processor: the architecture's, or the recipe's own.

    Raises:
        InputError: there is no such setting, or it cannot be as it is.
    """
    settings = preset_of(spec).get("pixels") or spec.pixels
    check_known("model.pixels", settings, ConvLlavaImageProcessorPil)
    try:
        ConvLlavaImageProcessorPil(**settings)
    except (InputError, TypeError) as error:
        raise InputError(f"model.pixels: {one_line(error)}") from None
    return settings


def check_pixels(recipe: Recipe, pixels: ConvLlavaImageProcessorPil) -> None:
    """Refuse settings of pixels, which add up from stage to stage, that cannot be.

    Raises:
        InputError: names the stage.
    """
    pixels = copy.deepcopy(pixels)
    for stage in recipe.stages:
        try:
            pixels.change(**stage.pixels)
        except (InputError, TypeError) as error:
            raise InputError(f"stage {stage.name}: pixels: {error}") from None


def check_known(where: str, settings: Mapping[str, Any], kind: type) -> None:
    """Refuse settings that a configuration or image processor does not have.

    Raises:
        InputError: names the nearest known setting.
    """
    known = set(dir(kind)) | set(inspect.signature(kind).parameters)
    for key in settings:
        if key not in known:
            raise InputError(f"{where}: there is no setting {key!r}{nearest(key, known)}")
