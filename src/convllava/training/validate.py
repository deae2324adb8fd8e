"""Checks of a recipe before anything is written: an error that would stop a later stage stops the run now."""

from transformers.integrations import get_reporting_integration_callbacks

from convllava import checkpoints
from convllava.checkpoints.adapters import is_adapter
from convllava.checkpoints.official_layout import is_official
from convllava.errors import ConfigError
from convllava.io import one_line
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.training.datasets import make_world
from convllava.training.distributed import check_sharding
from convllava.training.lora import check_adaptable
from convllava.training.objectives.attention_supervision import check_attention
from convllava.training.objectives.auxiliary_heads import detach_heads
from convllava.training.objectives.build import build_trained_module
from convllava.training.optim import train_only
from convllava.training.recipe import Recipe
from convllava.training.stage import StageRun


def check_recipe(recipe: Recipe, processes: int) -> None:
    """Check everything that can be checked without the model.

    Args:
        recipe: The recipe.
        processes: Number of processes that train together.

    Raises:
        InputError: if a stage could not run; the message names the setting.
    """
    check_sharding(recipe, processes)
    for name in recipe.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(f"report_to: {name}: {one_line(error)}") from None
    for index, stage in enumerate(recipe.stages):
        if not stage.data.sources:
            make_world(stage.data, seed=0)
        if stage.adapter is None or not stage.adapter.four_bit:
            continue
        if index > 0 and recipe.stages[index - 1].adapter is not None:
            raise ConfigError(
                f"stage {stage.name}: four_bit cannot follow an adapter; merge that one and use a recipe of its own"
            )
        found = checkpoints.find(recipe.model.checkpoint) if index == 0 and recipe.model.checkpoint else None
        if found is not None and (is_adapter(found) or is_official(found)):
            raise ConfigError(
                f"stage {stage.name}: four_bit needs a whole checkpoint in our layout; merge or convert it"
            )


def check_model(run: StageRun, model: ConvLlavaForConditionalGeneration) -> None:
    """Check that the model has the parts that a stage trains, and supports the stage's settings.

    Raises:
        InputError: if it does not; the message names the part or setting.
    """
    if run.stage.adapter is None:
        try:
            build_trained_module(run.stage, model, run.processor)
        finally:
            detach_heads(model)
    else:
        check_adaptable(run.stage)
        train_only(model, run.stage.learning_rates)
    check_attention(model, run.stage)
