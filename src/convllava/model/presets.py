"""Architectures by name, from presets.json: towers, language models and whole models."""

import json
from importlib import resources
from typing import Any

from convllava.model.config import ConvLlavaVisionConfig


def presets() -> dict[str, dict[str, Any]]:
    """Return the settings (vision, language and pixels) of whole architectures by name, the published ones first."""
    content = _content()
    return {
        name: {
            "vision": content["towers"][parts["tower"]],
            "language": content["languages"][parts["language"]],
            "pixels": {"mode": "square", "side": parts["side"]},
        }
        for name, parts in content["models"].items()
    }


def towers() -> dict[str, ConvLlavaVisionConfig]:
    """Return the five-stage towers by name: ConvNeXt T, S, B and L with a fifth stage, and the tower of the bundled
    model (`tiny`).

    The fifth stage is twice as wide as the fourth. It has as many blocks as the fourth; the published L has six.
    """
    return {name: ConvLlavaVisionConfig(**settings) for name, settings in _content()["towers"].items()}


def language_models() -> dict[str, dict[str, Any]]:
    """Return shapes of language models by name: Llama's 7b and 13b, the small 0.5b (Qwen2.5) and 135m (SmolLM2), and
    the language model of the bundled model (`tiny`)."""
    return _content()["languages"]


def _content() -> dict[str, Any]:
    return json.loads(resources.files("convllava").joinpath("presets.json").read_text(encoding="utf-8"))
