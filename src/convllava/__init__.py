"""ConvLLaVA: a five-stage ConvNeXt as the only visual encoder of a large multimodal model (arXiv 2405.15738).

docs/python.md shows each name in use. Importing the package is fast: torch and transformers are imported when a name
such as `load` is first used. That also registers the classes with the Auto classes of transformers. A program that uses
only `AutoModelForImageTextToText`, `AutoProcessor` and so on imports them with `import convllava.model.auto`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convllava.checkpoints import convert
    from convllava.checkpoints.assembly import build
    from convllava.errors import CheckpointError, ConfigError, DataError, ImageError, InputError
    from convllava.evaluation import Result, evaluate
    from convllava.inference import Assistant, load
    from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
    from convllava.model.image_processing import ConvLlavaImageProcessorPil
    from convllava.model.modeling import ConvLlavaForConditionalGeneration, ConvLlavaModel
    from convllava.model.processing import ConvLlavaProcessor
    from convllava.model.vision_tower import ConvLlavaVisionModel
    from convllava.synthetic import World
    from convllava.training.recipe import Recipe
    from convllava.training.train import train

__version__ = "0.1.0"

_MODULES = {
    "Assistant": "inference",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ConvLlavaConfig": "model.config",
    "ConvLlavaForConditionalGeneration": "model.modeling",
    "ConvLlavaImageProcessorPil": "model.image_processing",
    "ConvLlavaModel": "model.modeling",
    "ConvLlavaProcessor": "model.processing",
    "ConvLlavaVisionConfig": "model.config",
    "ConvLlavaVisionModel": "model.vision_tower",
    "DataError": "errors",
    "ImageError": "errors",
    "InputError": "errors",
    "Recipe": "training.recipe",
    "Result": "evaluation",
    "World": "synthetic",
    "build": "checkpoints.assembly",
    "convert": "checkpoints",
    "evaluate": "evaluation",
    "load": "inference",
    "train": "training.train",
}

__all__ = [
    "Assistant",
    "CheckpointError",
    "ConfigError",
    "ConvLlavaConfig",
    "ConvLlavaForConditionalGeneration",
    "ConvLlavaImageProcessorPil",
    "ConvLlavaModel",
    "ConvLlavaProcessor",
    "ConvLlavaVisionConfig",
    "ConvLlavaVisionModel",
    "DataError",
    "ImageError",
    "InputError",
    "Recipe",
    "Result",
    "World",
    "build",
    "convert",
    "evaluate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'convllava' has no attribute {name!r}")
    if _MODULES[name] not in ("errors", "synthetic", "training.recipe"):  # these need no model
        importlib.import_module("convllava.model.auto")
    return getattr(importlib.import_module(f"convllava.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
