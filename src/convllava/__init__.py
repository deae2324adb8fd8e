"""ConvLLaVA: a five-stage ConvNeXt as the only visual encoder of a large multimodal model (arXiv 2405.15738).

Importing the package registers its classes with the Auto classes of transformers.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
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
    "build": "checkpoints.assembly",
    "load": "inference",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convllava' has no attribute {name!r}")
    return getattr(importlib.import_module(f"convllava.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


# transformers takes seconds to import. The command line must answer `--help` at once, so there registration waits
# for the first command that needs a model (each imports convllava.model.auto).
def _is_command() -> bool:
    """Whether this is `convllava` or `python -m convllava`, where argv still begins with -m while this file is read."""
    if sys.argv[0] != "-m":
        return Path(sys.argv[0]).stem == "convllava"
    words = iter(sys.orig_argv)
    return "-m" in words and next(words, "") == __name__  # what stands behind -m


if not _is_command():
    importlib.import_module("convllava.model.auto")
