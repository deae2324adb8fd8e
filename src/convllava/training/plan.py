"""Plan a run without training: the parts, data and length of every stage, and the missing files.

convllava train recipes/paper/1536.yaml --dry-run
"""

from pathlib import Path
from typing import TypedDict, cast

import torch
from rich.table import Table
from torch import nn

from convllava.geometry import Size, visual_tokens
from convllava.io import is_hub_id
from convllava.model.image_processing import SQUARE, ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.part_names import module_of, parts_of
from convllava.training.datasets import addresses_of, count_steps, missing_files, missing_image_folders
from convllava.training.distributed import check_processes, micro_batch_samples
from convllava.training.initialise import initial_image_processor, model_without_weights
from convllava.training.lora import check_adaptable
from convllava.training.memory import Memory, memory_of
from convllava.training.objectives.dense import DensePretraining
from convllava.training.optim import train_only
from convllava.training.recipe import Recipe, Stage
from convllava.training.stage import pixels_by_stage
from convllava.training.validate import check_recipe


class StagePlan(TypedDict):
    """One stage: parameters of every part of the model, learning rates of those that train, and steps if known.
    `memory_gb` is for the largest micro-batch in each process (see `memory_of`)."""

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
    """A whole run. If images become squares, `image` has the side of the square and its number of visual tokens."""

    name: str
    processes: int
    image: dict[str, int]
    stages: list[StagePlan]
    missing: list[str]


def plan(recipe: Recipe, processes: int = 1) -> Plan:
    """Plan a run. Files may be missing; the plan lists them.

    Args:
        recipe: The recipe.
        processes: Number of processes that would train together.

    Raises:
        InputError: if the run could not start for another reason. Whether a language model supports attention
            supervision is known only when it is loaded.
    """
    check_processes(recipe, processes)
    check_recipe(recipe, processes)
    model, pixels = model_without_weights(recipe), initial_image_processor(recipe)
    by_stage = pixels_by_stage(recipe, pixels)
    vision, language = recipe.model.vision_from, recipe.model.language_from
    needed = [vision, None if language is not None and is_hub_id(language) else language]  # a hub id is downloaded
    missing = [name for name in needed if name is not None and not Path(name).exists()]
    missing += [*missing_files(recipe), *map(str, missing_image_folders(recipe))]
    if not missing_files(recipe):
        recipe = count_steps(recipe)
    image = {}
    if pixels.mode in SQUARE:
        vision_config, canvas = model.config.vision_config, Size(pixels.side, pixels.side)
        tokens = visual_tokens(canvas, vision_config.stride, model.config.row_separator)
        image = {"side": pixels.side, "visual_tokens": tokens}
    return {
        "name": recipe.name,
        "processes": processes,
        "image": image,
        "stages": [
            _stage_plan(recipe, stage, model, own, processes)
            for stage, own in zip(recipe.stages, by_stage, strict=True)
        ],
        "missing": missing,
    }


def _stage_plan(
    recipe: Recipe,
    stage: Stage,
    model: ConvLlavaForConditionalGeneration,
    pixels: ConvLlavaImageProcessorPil,
    processes: int,
) -> StagePlan:
    if stage.adapter is not None:
        check_adaptable(stage)
    if stage.objective == "dense":
        with torch.device("meta"):
            train_only(DensePretraining(model.model.vision_tower), stage.learning_rates)
    else:  # the heads of other objectives do not exist yet
        train_only(model, set(stage.learning_rates) - {"head"})
    parameters = {part: sum(parameter.numel() for _, parameter in named) for part, named in parts_of(model).items()}
    adapted = stage.adapter.parts if stage.adapter is not None else []
    trained = sum(parameters[part] for part in stage.learning_rates if part != "head" and part not in adapted)
    if stage.adapter is not None:
        layers = [layer for part in adapted for layer in model.get_submodule(module_of(part)).modules()]
        sides = sum(layer.in_features + layer.out_features for layer in layers if isinstance(layer, nn.Linear))
        trained += stage.adapter.rank * sides

    # The largest micro-batch: every sample has an image of the largest size and the longest sequence.
    samples = micro_batch_samples(stage, processes)
    tokens = samples * (stage.data.max_tokens or model.config.text_config.max_position_embeddings)
    area = samples * pixels.budget
    if stage.budget is not None:
        tokens, area = min(tokens, stage.budget.tokens or tokens), min(area, stage.budget.pixels or area)
    sharing = 1 if recipe.sharding == "none" else processes
    return {
        "name": stage.name,
        "objective": stage.objective,
        "parameters": parameters,
        "learning_rates": stage.learning_rates,
        "trained": trained,
        "batch_size": stage.batch_size,
        "steps": stage.steps,
        "epochs": stage.epochs,
        "memory_gb": memory_of(sum(parameters.values()), trained, model.config, stage, area, tokens, sharing),
        "data": [path for source in stage.data.sources for path in addresses_of(recipe, source)] or ["generated pages"],
    }


def tables_of(report: Plan) -> list[Table]:
    """Return one table for each stage for the terminal."""
    image, tables = report["image"], []
    for number, stage in enumerate(report["stages"]):
        length = f"{stage['steps']:,} steps" if stage["steps"] is not None else f"{stage['epochs']:g} epochs"
        size = f", {image['side']} px and {image['visual_tokens']} visual tokens per image" if image else ""
        title = f"stage {number}: {stage['name']}, {length} of {stage['batch_size']}{size}"
        data = "data: " + "\n".join(stage["data"])
        table = Table(title=title, title_justify="left", caption_justify="left", caption=data)
        for column in ("part", "parameters", "learning rate"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for part, count in stage["parameters"].items():
            rate = stage["learning_rates"].get(part)
            table.add_row(part, f"{count:,}", "frozen" if rate is None else f"{rate:g}")
        table.add_section()
        table.add_row("trained", f"{stage['trained']:,}", "")
        table.add_section()
        sizes = cast(dict[str, float], stage["memory_gb"])
        for kind, gigabytes in sizes.items():
            table.add_row(kind.replace("_", " "), f"{gigabytes:,} GB", "")
        each = "" if report["processes"] == 1 else f" in each of {report['processes']}"
        table.add_row("memory" + each, f"{sum(sizes.values()):,.1f} GB", "")
        tables.append(table)
    return tables


def explain_missing(report: Plan) -> str:
    """Return one line for each missing file; empty if nothing is missing."""
    return "\n".join(f"missing: {path}" for path in report["missing"])
