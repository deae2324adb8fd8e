"""What a model is made of and what it costs, without allocating its weights.

    convllava info convllava-1536-7b
    convllava info T --sides 768,1024,1536

Parameters are counted and floating-point operations recorded on torch's meta device, where tensors have shapes only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, TypedDict

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from convllava import checkpoints
from convllava.errors import InputError
from convllava.geometry import Size, visual_tokens
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.costs import tower_flops
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.part_names import parts_of
from convllava.model.vision_tower import ConvLlavaVisionModel, check_multiples

SIDES = (384, 768, 1024, 1536)
TEXT_TOKENS = 64
"""Of a prompt besides its image."""
PAPER_STAGES = {
    "1 projector initialisation": ("stage5", "projector"),
    "2 vision-language pretraining": ("stage3", "stage4", "stage5", "projector", "language_model"),
    "3 visual instruction tuning": ("projector", "language_model"),
}
_GB = 1e9


class ImageCost(TypedDict):
    """One size of image: visual tokens, and GFLOP of the tower with projector and of the prompt's prefill."""

    height: int
    width: int
    visual_tokens: int
    tower_gflop: float
    prefill_gflop: float


class TowerCost(TypedDict):
    """One side of square image, in pixels: visual tokens and GFLOP of the tower."""

    side: int
    visual_tokens: int
    gflop: float


class TowerReport(TypedDict):
    """What `inspect_tower` found; stride: pixels of a token's side."""

    name: str
    parameters: int
    stride: int
    images: list[TowerCost]


class Report(TypedDict):
    """What `inspect` found; side: the resolution that a preset is trained at; memory in GB."""

    name: str
    side: int | None
    parameters: dict[str, int]
    images: list[ImageCost]
    inference_gb: dict[str, float]
    training_gb: dict[str, float]


def presets() -> dict[str, dict[str, Any]]:
    """Whole architectures by name, the published ones first: settings of vision, language and pixels."""
    content = _presets()
    return {
        name: {
            "vision": content["towers"][parts["tower"]],
            "language": content["languages"][parts["language"]],
            "pixels": {"mode": "square", "side": parts["side"]},
        }
        for name, parts in content["models"].items()
    }


def towers() -> dict[str, ConvLlavaVisionConfig]:
    """The family of five-stage towers: ConvNeXt T, S, B and L, each with a fifth stage of twice the fourth's width and,
    but for the published L, of its depth; and that of the weights in the package."""
    return {name: ConvLlavaVisionConfig(**settings) for name, settings in _presets()["towers"].items()}


def language_models() -> dict[str, dict[str, Any]]:
    """Shapes of language models by name: Llama's 7B and 13B, small ones (Qwen2.5-0.5B's, SmolLM2-135M's), and that of
    the weights in the package."""
    return _presets()["languages"]


def _presets() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files("convllava").joinpath("presets.json").read_text(encoding="utf-8"))


def configuration_of(name: str) -> ConvLlavaConfig:
    """The configuration of a preset or of a checkpoint's folder.

    Raises:
        InputError: neither a preset nor a folder with a model of ours.
    """
    known = presets()
    if name in known:
        language = known[name]["language"]
        return ConvLlavaConfig(
            vision_config=ConvLlavaVisionConfig(**known[name]["vision"]),
            text_config=language,
            image_token_id=language["vocab_size"],
        )
    try:
        return checkpoints.configuration(checkpoints.find(name))
    except InputError as error:
        raise InputError(f"{error}, or a preset: {', '.join(known)}") from None


def inspect(name: str, sides: Sequence[int] | None = None) -> Report:
    """Parameters, cost per image and memory of a preset or checkpoint.

    Args:
        name: Of the preset, or the checkpoint's folder.
        sides: Of square images in pixels; `SIDES`, brought to multiples of the stride, where none are given.

    Raises:
        InputError: there is no such model, or a side is no multiple of its stride.
    """
    config = configuration_of(name)
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config).eval()
    parameters = {part: sum(p.numel() for _, p in named) for part, named in parts_of(model).items()}
    stride = config.vision_config.stride
    sides = sides or sorted({max(stride, round(side / stride) * stride) for side in SIDES})
    check_multiples([Size(side, side) for side in sides], stride)
    return {
        "name": name,
        "side": presets().get(name, {}).get("pixels", {}).get("side"),
        "parameters": parameters,
        "images": [image_cost(model, Size(side, side)) for side in sides],
        "inference_gb": inference_memory(config, sum(parameters.values())),
        "training_gb": {
            stage: training_memory(parameters, trained)
            for stage, trained in PAPER_STAGES.items()
            if set(trained) <= set(parameters)
        },
    }


def inspect_tower(name: str, sides: Sequence[int]) -> TowerReport:
    """Parameters and cost of a tower of the family alone, on square images of these sides in pixels.

    Raises:
        InputError: there is no such tower, or a side is no multiple of its stride.
    """
    if name not in towers():
        raise InputError(f"there is no tower {name!r}; choose of {', '.join(towers())}")
    config = towers()[name]
    check_multiples([Size(side, side) for side in sides], config.stride)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in ConvLlavaVisionModel(config).parameters())
    return {
        "name": name,
        "parameters": parameters,
        "stride": config.stride,
        "images": [_tower_cost(config, side) for side in sides],
    }


def _tower_cost(config: ConvLlavaVisionConfig, side: int) -> TowerCost:
    canvas = Size(side, side)
    tokens = visual_tokens(canvas, config.stride, False)
    return {"side": side, "visual_tokens": tokens, "gflop": round(tower_flops(config, canvas) / 1e9, 1)}


def tower_table(report: TowerReport) -> Table:
    """The report for the terminal."""
    title = f"tower {report['name']}: {report['parameters']:,} parameters, stride {report['stride']}"
    table = Table(title=title, title_justify="left")
    for column in ("pixels", "visual tokens", "GFLOP"):
        table.add_column(column, justify="right")
    for cost in report["images"]:
        table.add_row(f"{cost['side']}x{cost['side']}", f"{cost['visual_tokens']:,}", f"{cost['gflop']:,}")
    return table


def image_cost(model: ConvLlavaForConditionalGeneration, canvas: Size) -> ImageCost:
    """Of one image of this size in a prompt with `TEXT_TOKENS` tokens of text; the model lies on the meta device."""
    config = model.config
    tokens = visual_tokens(canvas, config.vision_config.stride, config.row_separator)
    pixels = torch.empty(1, config.vision_config.num_channels, *canvas, device="meta")
    prompt = torch.empty(1, tokens + TEXT_TOKENS, config.text_config.hidden_size, device="meta")
    # Given whole, since making a mask looks at values, which there are none of here.
    mask = torch.empty(1, 1, prompt.shape[1], prompt.shape[1], dtype=torch.bool, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as tower:
        model.get_image_features(pixels)
    with torch.no_grad(), FlopCounterMode(display=False) as prefill:
        model.model.language_model(inputs_embeds=prompt, attention_mask=mask, use_cache=False)
    return {
        "height": canvas.height,
        "width": canvas.width,
        "visual_tokens": tokens,
        "tower_gflop": round(tower.get_total_flops() / 1e9, 1),
        "prefill_gflop": round(prefill.get_total_flops() / 1e9, 1),
    }


def inference_memory(config: ConvLlavaConfig, parameters: int) -> dict[str, float]:
    """Weights in bfloat16, and the key-value cache of one sequence of the whole context."""
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * width * text.max_position_embeddings * 2
    return {"weights": round(2 * parameters / _GB, 2), "cache": round(cache / _GB, 2)}


def training_memory(parameters: dict[str, int], trained: tuple[str, ...]) -> float:
    """Of weights, gradients and AdamW's two moments in float32, as the trainer keeps them (bfloat16 is for arithmetic):
    16 bytes for a parameter that trains, 4 for a frozen one, before activations."""
    count = sum(parameters[part] for part in trained)
    return round((16 * count + 4 * (sum(parameters.values()) - count)) / _GB, 2)


def tables_of(report: Report) -> list[Table]:
    """The report for the terminal."""
    parts = Table(title=f"{report['name']}: parameters", title_justify="left")
    parts.add_column("part")
    parts.add_column("parameters", justify="right")
    for part, count in [*report["parameters"].items(), ("all", sum(report["parameters"].values()))]:
        parts.add_row(part, f"{count:,}")
    images = Table(title=f"one image and {TEXT_TOKENS} tokens of text (*: trained at)", title_justify="left")
    for column in ("pixels", "visual tokens", "tower GFLOP", "prefill GFLOP"):
        images.add_column(column, justify="right")
    for cost in report["images"]:
        row = (cost["visual_tokens"], cost["tower_gflop"], cost["prefill_gflop"])
        mark = " *" if cost["height"] == report["side"] else ""
        images.add_row(f"{cost['height']}x{cost['width']}{mark}", *(f"{value:,}" for value in row))
    memory = Table(title="memory in GB, before activations", title_justify="left")
    memory.add_column("for")
    memory.add_column("GB", justify="right")
    memory.add_row("inference: weights in bfloat16", f"{report['inference_gb']['weights']:,}")
    memory.add_row("inference: cache of one full context", f"{report['inference_gb']['cache']:,}")
    for stage, size in report["training_gb"].items():
        memory.add_row(f"training, stage {stage}", f"{size:,}")
    return [parts, images, memory]
