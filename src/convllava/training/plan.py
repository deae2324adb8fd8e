"""A recipe resolved without running it: what every stage trains, on what, for how long, and which files are missing.

convllava train recipes/paper/1536.yaml --dry-run
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, cast

import torch
from rich.table import Table
from torch import nn

from convllava.geometry import Size, visual_tokens
from convllava.io import is_hub_id
from convllava.model.image_processing import SQUARE, ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.part_names import module_of
from convllava.training.datasets import addresses_of, missing_files, missing_images, with_steps
from convllava.training.distributed import check_processes, samples_of
from convllava.training.initialise import check_pixels, outline, pixels_of
from convllava.training.lora import check_adaptable
from convllava.training.memory import Memory, memory_of
from convllava.training.objectives.dense import DensePretraining
from convllava.training.optim import parts_of, train_only
from convllava.training.recipe import Recipe, Stage
from convllava.training.validate import check_recipe


class StagePlan(TypedDict):
    """One stage: parameters of every part of the model, learning rates of those that train; steps where they are known;
    and what the fullest pass holds in each process (see `memory_of`)."""

    name: str
    objective: str
    parameters: dict[str, int]
    learning_rates: dict[str, float]
    trained: int
    batch_size: int
    steps: int | None
    epochs: float | None
    memory_gb: Memory
    data: list[str]


class Plan(TypedDict):
    """`image`: side of the square and visual tokens it becomes, where images are squares."""

    name: str
    processes: int
    image: dict[str, int]
    stages: list[StagePlan]
    missing: list[str]


def plan(recipe: Recipe, processes: int = 1) -> Plan:
    """Resolve a recipe.

    Args:
        recipe: What would be trained.
        processes: That would train it together.

    Raises:
        InputError: what would stop the run, but for files that are missing, and a language model whose attention cannot
            be guided, which is only known of the model itself.
    """
    check_processes(recipe, processes)
    check_recipe(recipe, processes)
    model, pixels = outline(recipe), pixels_of(recipe)
    check_pixels(recipe, pixels)
    missing = [*_missing_parts(recipe), *map(str, missing_files(recipe)), *map(str, missing_images(recipe))]
    if not any(missing_files(recipe)):
        recipe = with_steps(recipe)
    return {
        "name": recipe.name,
        "processes": processes,
        "image": _image_of(recipe, model),
        "stages": [_stage_plan(recipe, stage, model, pixels, processes) for stage in recipe.stages],
        "missing": missing,
    }


def _stage_plan(
    recipe: Recipe,
    stage: Stage,
    model: ConvLlavaForConditionalGeneration,
    pixels: ConvLlavaImageProcessorPil,
    processes: int,
) -> StagePlan:
    """One stage's; `pixels` takes up its settings, which stay changed for the stages after it."""
    pixels.change(**stage.pixels)
    if stage.adapter is not None:
        check_adaptable(stage)
    _check_parts(stage, model)
    parameters = {part: sum(parameter.numel() for _, parameter in named) for part, named in parts_of(model).items()}
    return {
        "name": stage.name,
        "objective": stage.objective,
        "parameters": parameters,
        "learning_rates": stage.learning_rates,
        "trained": _trained(stage, model, parameters),
        "batch_size": stage.batch_size,
        "steps": stage.steps,
        "epochs": stage.epochs,
        "memory_gb": _fullest_pass(recipe, stage, model, pixels, parameters, processes),
        "data": [path for source in stage.data.sources for path in addresses_of(recipe, source)] or ["generated pages"],
    }


def _check_parts(stage: Stage, model: ConvLlavaForConditionalGeneration) -> None:
    """Refuse parts that what a stage trains does not have. Of the dense objective that is not the whole model; heads of
    the others are made when they train."""
    if stage.objective == "dense":
        with torch.device("meta"):
            train_only(DensePretraining(model.model.vision_tower), stage.learning_rates)
    else:
        train_only(model, set(stage.learning_rates) - {"head"})


def _trained(stage: Stage, model: ConvLlavaForConditionalGeneration, parameters: dict[str, int]) -> int:
    """Parameters that train: of a part whole, or the two small matrices beside each of its linear layers."""
    adapter = stage.adapter
    adapted = adapter.parts if adapter is not None else []
    whole = sum(parameters[part] for part in stage.learning_rates if part != "head" and part not in adapted)
    if adapter is None:
        return whole
    layers = [layer for part in adapted for layer in model.get_submodule(module_of(part)).modules()]
    sides = sum(layer.in_features + layer.out_features for layer in layers if isinstance(layer, nn.Linear))
    return whole + adapter.rank * sides


def _fullest_pass(
    recipe: Recipe,
    stage: Stage,
    model: ConvLlavaForConditionalGeneration,
    pixels: ConvLlavaImageProcessorPil,
    parameters: dict[str, int],
    processes: int,
) -> Memory:
    """With one image of the largest size and the longest sequence in each sample of a pass, or the budget's full."""
    longest = stage.data.max_tokens or model.config.text_config.max_position_embeddings
    samples = samples_of(stage, processes)
    tokens, area = samples * longest, samples * pixels.budget
    if stage.budget is not None:
        tokens, area = min(tokens, stage.budget.tokens or tokens), min(area, stage.budget.pixels or area)
    sharing = 1 if recipe.sharding == "none" else processes
    whole, trained = sum(parameters.values()), _trained(stage, model, parameters)
    return memory_of(whole, trained, model.config, stage, area, tokens, sharing)


def _missing_parts(recipe: Recipe) -> list[str]:
    """Folders of pretrained parts that are not there; a language model by its hub id would be fetched."""
    vision, language = recipe.model.vision_from, recipe.model.language_from
    fetched = language is not None and is_hub_id(language)
    needed = [vision, None if fetched else language]
    return [name for name in needed if name is not None and not Path(name).exists()]


def _image_of(recipe: Recipe, model: ConvLlavaForConditionalGeneration) -> dict[str, int]:
    pixels = pixels_of(recipe)
    if pixels.mode not in SQUARE:
        return {}
    canvas = Size(pixels.side, pixels.side)
    tokens = visual_tokens(canvas, model.config.vision_config.stride, model.config.row_separator)
    return {"side": pixels.side, "visual_tokens": tokens}


def tables_of(report: Plan) -> list[Table]:
    """One table a stage for the terminal."""
    return [_table_of(report, number) for number in range(len(report["stages"]))]


def _table_of(report: Plan, number: int) -> Table:
    stage, image = report["stages"][number], report["image"]
    length = f"{stage['steps']:,} steps" if stage["steps"] is not None else f"{stage['epochs']:g} epochs"
    size = f", {image['side']} px and {image['visual_tokens']} visual tokens an image" if image else ""
    title = f"stage {number}: {stage['name']}, {length} of {stage['batch_size']}{size}"
    table = Table(
        title=title, title_justify="left", caption_justify="left", caption="data: " + "\n".join(stage["data"])
    )
    for column in ("part", "parameters", "learning rate"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, count in stage["parameters"].items():
        rate = stage["learning_rates"].get(part)
        table.add_row(part, f"{count:,}", "frozen" if rate is None else f"{rate:g}")
    table.add_section()
    table.add_row("trains", f"{stage['trained']:,}", "")
    table.add_section()
    sizes = cast(dict[str, float], stage["memory_gb"])
    for kind, gigabytes in sizes.items():
        table.add_row(kind.replace("_", " "), f"{gigabytes:,} GB", "")
    each = "" if report["processes"] == 1 else f" in each of {report['processes']}"
    table.add_row("memory" + each, f"{sum(sizes.values()):,.1f} GB", "")
    return table


def explain_missing(report: Plan) -> str:
    """One line a missing file; empty if nothing is missing."""
    return "\n".join(f"missing: {path}" for path in report["missing"])
