"""A model shared by several processes: FSDP2 or DeepSpeed's ZeRO, through the Trainer and accelerate."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from convllava.errors import InputError
from convllava.training.recipe import Recipe, Stage


def sharding_arguments(recipe: Recipe) -> dict[str, Any]:
    """What `TrainingArguments` must be told."""
    if recipe.sharding == "none":
        return {}
    if recipe.sharding == "fsdp":
        return {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    return {"deepspeed": deepspeed_config(int(recipe.sharding[-1]))}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """ZeRO (arXiv 1910.02054): stage 2 shards gradients and the optimiser's state, stage 3 the weights too.

    What is `auto` the Trainer fills in from the recipe.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        # The optimiser is the recipe's, with rates by part.
        "zero_allow_untested_optimizer": True,
    }


def check_sharding(recipe: Recipe, processes: int) -> None:
    """Refuse what a shared model cannot do.

    Args:
        recipe: Its stages and how they share.
        processes: That train together.

    Raises:
        InputError: names the stage and the setting.
    """
    if recipe.sharding == "none":
        return
    if processes == 1:
        raise InputError(
            f"sharding: {recipe.sharding} is for several processes; start them with torchrun, or take none"
        )
    if recipe.sharding != "fsdp":
        _check_deepspeed(recipe.sharding)
    for stage in recipe.stages:
        for name, is_set in _unshareable(stage).items():
            if is_set:
                raise InputError(
                    f"stage {stage.name}: {name} needs a whole model in each process; leave out sharding: "
                    f"{recipe.sharding}"
                )


def _check_deepspeed(sharding: str) -> None:
    if find_spec("deepspeed") is None:
        raise InputError(f"sharding: {sharding} needs DeepSpeed; pip install deepspeed, or take fsdp")
    if not torch.accelerator.is_available():
        raise InputError(f"sharding: {sharding} needs an accelerator, which this machine has not; take none")


def _unshareable(stage: Stage) -> dict[str, bool]:
    return {
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
