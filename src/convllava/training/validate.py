"""What would stop a run, asked before anything is written."""

from __future__ import annotations

from transformers.integrations import get_reporting_integration_callbacks

from convllava import checkpoints
from convllava.checkpoints.adapters import is_adapter
from convllava.checkpoints.official_layout import is_official
from convllava.errors import InputError
from convllava.io import one_line
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor
from convllava.training.datasets import make_world, missing_files
from convllava.training.distributed import process_count
from convllava.training.initialise import check_pixels
from convllava.training.lora import check_adaptable
from convllava.training.objectives.attention_supervision import check_attention
from convllava.training.objectives.auxiliary_heads import detach_heads
from convllava.training.objectives.build import build_trained_module
from convllava.training.optim import train_only
from convllava.training.recipe import Recipe, Stage
from convllava.training.sharding import check_sharding


def check_stages(recipe: Recipe, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor) -> None:
    """Refuse, before anything is written, what would stop a later stage.

    Raises:
        InputError: a file that is missing, pixels that cannot be, a part that the model does not have, or a world that
            cannot be drawn.
    """
    for path in missing_files(recipe):
        raise InputError(f"{path} is not there, and a stage needs it; --dry-run lists all that is missing")
    check_pixels(recipe, processor.image_processor)
    check_recipe(recipe, process_count())
    for stage in recipe.stages:
        check_trains(stage, model, processor)
        check_attention(model, stage)


def check_recipe(recipe: Recipe, processes: int) -> None:
    """Refuse what is seen to stop a run without the model.

    Raises:
        InputError: names the setting.
    """
    check_sharding(recipe, processes)
    check_reporters(recipe)
    check_four_bits(recipe)
    for stage in recipe.stages:
        if not stage.data.sources:
            make_world(stage.data, seed=0)


def check_reporters(recipe: Recipe) -> None:
    """Refuse loggers that transformers does not know, or that are not installed.

    Raises:
        InputError: names it.
    """
    for name in recipe.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise InputError(f"report_to: {name}: {one_line(error)}") from None


def check_four_bits(recipe: Recipe) -> None:
    """Refuse to quantise what is no whole checkpoint of ours.

    Raises:
        InputError: names the stage.
    """
    for index, stage in enumerate(recipe.stages):
        if stage.adapter is None or not stage.adapter.four_bit:
            continue
        if index > 0 and recipe.stages[index - 1].adapter is not None:
            raise InputError(
                f"stage {stage.name}: four_bit cannot follow an adapter; merge that one in a run of its own"
            )
        found = checkpoints.find(recipe.model.checkpoint) if index == 0 and recipe.model.checkpoint else None
        if found is not None and (is_adapter(found) or is_official(found)):
            raise InputError(
                f"stage {stage.name}: four_bit needs a whole checkpoint in our layout; merge or convert it"
            )


def check_trains(stage: Stage, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor) -> None:
    """Refuse parts that the model does not have, or that take no adapter.

    Raises:
        InputError: names the part.
    """
    if stage.adapter is None:
        try:
            build_trained_module(stage, model, processor)
        finally:
            detach_heads(model)
        return
    check_adaptable(stage)
    train_only(model, stage.learning_rates)
