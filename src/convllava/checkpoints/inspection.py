"""The parts and the costs of a model, without allocating its weights.

    convllava info convllava-1536-7b
    convllava info T --sides 768,1024,1536

Parameters and floating-point operations are counted on torch's meta device, where tensors have shapes but no numbers.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from convllava import checkpoints
from convllava.errors import CheckpointError, ConfigError
from convllava.geometry import Size, visual_tokens
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.costs import tower_flops
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.part_names import parts_of
from convllava.model.presets import presets, towers
from convllava.model.vision_tower import ConvLlavaVisionModel, check_multiples

SIDES = (384, 768, 1024, 1536)
"""Sides of square images in pixels that are shown by default."""
TEXT_TOKENS = 64
"""Text tokens of the prompt whose prefill is counted, in addition to the image."""
PAPER_STAGES = {
    "1 projector initialisation": ("stage5", "projector"),
    "2 vision-language pretraining": ("stage3", "stage4", "stage5", "projector", "language_model"),
    "3 visual instruction tuning": ("projector", "language_model"),
}
_GB = 1e9


class ImageCost(TypedDict):
    """Costs of one image size in pixels: visual tokens, GFLOP of tower and projector, GFLOP of the prompt's prefill."""

    height: int
    width: int
    visual_tokens: int
    tower_gflop: float
    prefill_gflop: float


class TowerCost(TypedDict):
    """Costs of a square image with this side in pixels: visual tokens and GFLOP of the tower."""

    side: int
    visual_tokens: int
    gflop: float


class TowerReport(TypedDict):
    """Result of `inspect_tower`; `stride` is the side of a visual token in pixels."""

    name: str
    parameters: int
    stride: int
    images: list[TowerCost]


class Report(TypedDict):
    """Result of `inspect`; `side` is the resolution that a preset is trained at, memory is in GB."""

    name: str
    side: int | None
    parameters: dict[str, int]
    images: list[ImageCost]
    inference_gb: dict[str, float]
    training_gb: dict[str, float]


def configuration_of(name: str) -> ConvLlavaConfig:
    """Return the configuration of a preset or of a checkpoint.

    Raises:
        CheckpointError: if `name` is neither a preset nor a checkpoint with a model of ours.
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
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or a preset: {', '.join(known)}") from None


def inspect(name: str, sides: Sequence[int] | None = None) -> Report:
    """Return parameters, costs of images and memory of a preset or checkpoint.

    Args:
        name: The preset, or the checkpoint's folder.
        sides: Sides of square images in pixels; by default `SIDES`, rounded to multiples of the stride.

    Raises:
        InputError: if there is no such model, or a side is not a multiple of its stride.
    """
    config = configuration_of(name)
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config).eval()
    parameters = {part: sum(p.numel() for _, p in named) for part, named in parts_of(model).items()}
    stride = config.vision_config.stride
    sides = sides or sorted({max(stride, round(side / stride) * stride) for side in SIDES})
    check_multiples([Size(side, side) for side in sides], stride)
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    # Keys and values of one sequence that fills the context, in bfloat16.
    cache = 2 * text.num_hidden_layers * heads * width * text.max_position_embeddings * 2
    return {
        "name": name,
        "side": presets().get(name, {}).get("pixels", {}).get("side"),
        "parameters": parameters,
        "images": [_image_cost(model, Size(side, side)) for side in sides],
        "inference_gb": {"weights": round(2 * sum(parameters.values()) / _GB, 2), "cache": round(cache / _GB, 2)},
        "training_gb": {
            stage: training_memory(parameters, trained)
            for stage, trained in PAPER_STAGES.items()
            if set(trained) <= set(parameters)
        },
    }


def _image_cost(model: ConvLlavaForConditionalGeneration, canvas: Size) -> ImageCost:
    """Count one image of this size in a prompt with `TEXT_TOKENS` tokens of text; the model is on the meta device."""
    config = model.config
    tokens = visual_tokens(canvas, config.vision_config.stride, config.row_separator)
    pixels = torch.empty(1, config.vision_config.num_channels, *canvas, device="meta")
    prompt = torch.empty(1, tokens + TEXT_TOKENS, config.text_config.hidden_size, device="meta")
    # Give the mask: transformers would read values to build one, and meta tensors have no values.
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


def training_memory(parameters: dict[str, int], trained: tuple[str, ...]) -> float:
    """Return GB of weights, gradients and AdamW's two moments in float32, without activations.

    The trainer keeps weights in float32 and computes in bfloat16: 16 bytes per trained parameter, 4 per frozen one.
    """
    count = sum(parameters[part] for part in trained)
    return round((16 * count + 4 * (sum(parameters.values()) - count)) / _GB, 2)


def inspect_tower(name: str, sides: Sequence[int]) -> TowerReport:
    """Return parameters and costs of a tower alone, for square images with these sides in pixels.

    Raises:
        ConfigError: if there is no such tower.
        InputError: if a side is not a multiple of its stride.
    """
    if name not in towers():
        raise ConfigError(f"there is no tower {name!r}; choose one of {', '.join(towers())}")
    config = towers()[name]
    canvases = [Size(side, side) for side in sides]
    check_multiples(canvases, config.stride)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in ConvLlavaVisionModel(config).parameters())
    return {
        "name": name,
        "parameters": parameters,
        "stride": config.stride,
        "images": [
            {
                "side": canvas.width,
                "visual_tokens": visual_tokens(canvas, config.stride),
                "gflop": round(tower_flops(config, canvas) / 1e9, 1),
            }
            for canvas in canvases
        ],
    }


def tower_tables(report: TowerReport) -> list[Table]:
    """Return the report as tables for the terminal."""
    title = f"tower {report['name']}: {report['parameters']:,} parameters, stride {report['stride']}"
    table = Table(title=title, title_justify="left")
    for column in ("pixels", "visual tokens", "GFLOP"):
        table.add_column(column, justify="right")
    for cost in report["images"]:
        table.add_row(f"{cost['side']}x{cost['side']}", f"{cost['visual_tokens']:,}", f"{cost['gflop']:,}")
    return [table]


def model_tables(report: Report) -> list[Table]:
    """Return the report as tables for the terminal."""
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
    memory = Table(title="memory in GB, without activations", title_justify="left")
    memory.add_column("for")
    memory.add_column("GB", justify="right")
    memory.add_row("inference: weights in bfloat16", f"{report['inference_gb']['weights']:,}")
    memory.add_row("inference: cache of one full context", f"{report['inference_gb']['cache']:,}")
    for stage, size in report["training_gb"].items():
        memory.add_row(f"training, stage {stage}", f"{size:,}")
    return [parts, images, memory]
