"""How many processes train together, and which of them speaks."""

from __future__ import annotations

import os

from convllava.errors import InputError
from convllava.training.recipe import Recipe, Stage


def process_count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return process_number() == 0


def wait_for_all() -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        from accelerate import PartialState  # late, since plans and checks of data need no extra

        PartialState().wait_for_everyone()


def passes_of(stage: Stage, processes: int) -> int:
    """Forward passes of one process per optimiser step."""
    return stage.gradient_accumulation_steps if stage.budget is None else stage.budget.micro_batches // processes


def samples_of(stage: Stage, processes: int) -> int:
    """Samples of a pass of one process, or with a budget the most it may have."""
    return stage.batch_size // passes_of(stage, processes) // processes


def check_processes(recipe: Recipe, processes: int) -> None:
    """Refuse a batch that the processes cannot share.

    Raises:
        InputError: names the stage.
    """
    for stage in recipe.stages:
        if stage.budget is not None and stage.budget.micro_batches % processes:
            raise InputError(
                f"stage {stage.name}: budget.micro_batches {stage.budget.micro_batches} does not divide among "
                f"{processes} processes; make it a multiple of {processes}"
            )
        if stage.budget is None and stage.batch_size % (stage.gradient_accumulation_steps * processes):
            raise InputError(
                f"stage {stage.name}: batch_size {stage.batch_size} does not divide among {processes} processes "
                f"with gradient_accumulation_steps {stage.gradient_accumulation_steps}; make it a multiple of "
                f"{stage.gradient_accumulation_steps * processes}"
            )
