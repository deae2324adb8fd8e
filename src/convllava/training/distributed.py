"""Several processes that train together: how they share a batch (torchrun), and a model (FSDP2, DeepSpeed's ZeRO)."""

import os
from importlib.util import find_spec
from typing import Any

import torch

from convllava.errors import ConfigError
from convllava.training.recipe import Recipe, Stage


def process_count() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    """Return whether this is the process that writes files and prints."""
    return process_number() == 0


def wait_for_all() -> None:
    """Wait until every process has reached this point."""
    if process_count() > 1:
        from accelerate import PartialState  # imported late: `data check` and `--dry-run` do not need it

        PartialState().wait_for_everyone()


def micro_batches_per_step(stage: Stage, processes: int) -> int:
    """Return the number of micro-batches of one process per optimiser step."""
    return stage.gradient_accumulation_steps if stage.budget is None else stage.budget.micro_batches // processes


def micro_batch_samples(stage: Stage, processes: int) -> int:
    """Return the number of samples in a micro-batch of one process; with a budget, the most samples."""
    return stage.batch_size // micro_batches_per_step(stage, processes) // processes


def check_processes(recipe: Recipe, processes: int) -> None:
    """Check that the processes can share each stage's batch.

    Raises:
        ConfigError: if they cannot; the message names the stage.
    """
    for stage in recipe.stages:
        if stage.budget is not None and stage.budget.micro_batches % processes:
            raise ConfigError(
                f"stage {stage.name}: budget.micro_batches {stage.budget.micro_batches} does not divide among "
                f"{processes} processes; make it a multiple of {processes}"
            )
        multiple = stage.gradient_accumulation_steps * processes
        if stage.budget is None and stage.batch_size % multiple:
            raise ConfigError(
                f"stage {stage.name}: batch_size {stage.batch_size} does not divide among {processes} processes with "
                f"gradient_accumulation_steps {stage.gradient_accumulation_steps}; make it a multiple of {multiple}"
            )


def sharding_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of `TrainingArguments` for the recipe's sharding."""
    if recipe.sharding == "none":
        return {}
    if recipe.sharding == "fsdp":
        return {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    return {"deepspeed": deepspeed_config(int(recipe.sharding[-1]))}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """Return DeepSpeed's settings for ZeRO (arXiv 1910.02054).

    Args:
        stage: 2 shards gradients and optimiser state, 3 also the weights.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    return {
        "zero_optimization": zero,
        # The Trainer fills in "auto" from the recipe.
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        # Our optimiser has a learning rate for each part.
        "zero_allow_untested_optimizer": True,
    }


def check_sharding(recipe: Recipe, processes: int) -> None:
    """Check that the stages work with a model that the processes share.

    Args:
        recipe: The recipe.
        processes: Number of processes that train together.

    Raises:
        ConfigError: if a stage does not, or DeepSpeed cannot run; the message names stage and setting.
    """
    sharding = recipe.sharding
    if sharding == "none":
        return
    if processes == 1:
        raise ConfigError(f"sharding: {sharding} needs several processes; start them with torchrun, or set it to none")
    if sharding != "fsdp" and find_spec("deepspeed") is None:
        raise ConfigError(f"sharding: {sharding} needs DeepSpeed; pip install deepspeed, or set it to fsdp")
    if sharding != "fsdp" and not torch.accelerator.is_available():
        raise ConfigError(
            f"sharding: {sharding} needs an accelerator, which this machine does not have; set it to none"
        )
    for stage in recipe.stages:
        needs_whole_model = {
            f"objective {stage.objective}": stage.objective != "chat",
            "position_label_weight": stage.position_label_weight > 0,
            "optimizer muon": stage.optimizer == "muon",
            "ema": stage.ema > 0,
            "feature_cache_gb": stage.feature_cache_gb > 0,
            "evaluation.patience": stage.evaluation is not None and stage.evaluation.patience is not None,
            "evaluation.pictures": stage.evaluation is not None and stage.evaluation.pictures > 0,
            "adapter": stage.adapter is not None,
            "calibrate": stage.calibrate,
        }
        for name, is_set in needs_whole_model.items():
            if is_set:
                raise ConfigError(
                    f"stage {stage.name}: {name} needs a whole model in each process; leave out sharding: {sharding}"
                )
