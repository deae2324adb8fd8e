"""ConvLLaVA: a five-stage ConvNeXt as the only visual encoder of a large multimodal model (arXiv 2405.15738).

Importing the package is fast: it imports torch and transformers when a name such as `load` is used first. That also
registers the classes with the Auto classes of transformers. A program that uses only `AutoModelForImageTextToText`,
`AutoProcessor` and so on imports them with `import convllava.model.auto`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ConvLlavaConfig": "model.config",
    "ConvLlavaVisionConfig": "model.config",
    "ConvLlavaVisionModel": "model.vision_tower",
    "ConvLlavaModel": "model.modeling",
    "ConvLlavaForConditionalGeneration": "model.modeling",
    "ConvLlavaImageProcessorPil": "model.image_processing",
    "ConvLlavaProcessor": "model.processing",
    "InputError": "errors",
    "World": "synthetic",
    "build": "checkpoints.assembly",
    "load": "inference",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convllava' has no attribute {name!r}")
    if _HOMES[name] not in ("errors", "synthetic"):  # these need no transformers
        importlib.import_module("convllava.model.auto")
    return getattr(importlib.import_module(f"convllava.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
