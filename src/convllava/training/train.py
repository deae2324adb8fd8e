"""Runs a recipe: stage after stage through a small subclass of the Hugging Face Trainer.

    convllava train recipes/tiny-quick.yaml --output runs/quick [--resume]
    torchrun --nproc-per-node 2 -m convllava train recipes/tiny-quick.yaml --output runs/quick

Everything lies in the output folder: `recipe.yaml` (resolved), `log.jsonl` (one line an optimiser step), `tensorboard/`
and one folder per stage, `1-NAME/`, which is a loadable checkpoint with the recipe beside it, and the heads that the
next stage goes on with; it appears when the stage is complete. A stage in progress keeps
`.1-NAME.progress/checkpoint-STEP/`, from which `--resume` continues exactly.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from convllava import checkpoints
from convllava.errors import InputError
from convllava.inference import Assistant
from convllava.io import make_output, replacing
from convllava.training.calibration import calibrate
from convllava.training.datasets import (
    distinct_samples,
    image_of,
    make_collator,
    make_dataset,
    make_held_out,
    questions_of,
)
from convllava.training.distributed import check_processes, is_first_process, process_count, wait_for_all
from convllava.training.eval_callbacks import SampleAnswers, early_stopping_callbacks, has_stopped_early
from convllava.training.frozen_features import CachedFeatureCollator, make_frozen_stages
from convllava.training.initialise import start
from convllava.training.logging import ProgressBar, Skips, StepLog, print_parts
from convllava.training.lora import four_bits
from convllava.training.measuring import in_passes, with_planned_steps
from convllava.training.objectives.attention_supervision import enable_attention_supervision
from convllava.training.objectives.auxiliary_heads import detach_heads
from convllava.training.objectives.build import build_trained_module
from convllava.training.recipe import Recipe, Stage
from convllava.training.trainer import StageTrainer, training_arguments
from convllava.training.validate import check_stages

CALIBRATION_SAMPLES = 32
_SHOWN = 6
"""Settings that differ from those of the run in the folder."""


def train(recipe: Recipe, output: str | Path, *, resume: bool = False, max_steps: int | None = None) -> Path:
    """Train every stage of a recipe that is not complete yet.

    Args:
        recipe: What to train.
        output: Folder for checkpoints and logs.
        resume: Continue in a folder that holds a run of the same recipe.
        max_steps: Cap every stage at so many steps (to try a recipe).

    Returns:
        The folder of the last stage's checkpoint.

    Raises:
        InputError: the folder holds another run, or the recipe does not fit the model.
    """
    output = Path(output)
    check_processes(recipe, process_count())
    if is_first_process():
        check_output(output, resume)  # before anything is measured
    recipe = capped(with_planned_steps(recipe, output), max_steps)
    set_seed(recipe.seed)
    make_room_for_kernels(recipe)
    model, processor = start(recipe)
    check_stages(recipe, model, processor)
    if is_first_process():
        prepare_output(recipe, output, resume)
    folders = [output / f"{index}-{stage.name}" for index, stage in enumerate(recipe.stages)]
    # After the last and not by their number: who needs the room removes the first ones.
    done = [index for index, folder in enumerate(folders) if folder.exists()]
    for index in range(1 + max(done, default=-1), len(folders)):
        if index > 0:
            # From the folder and not from memory, so that a resumed run sees what an uninterrupted one saw.
            model, processor = checkpoints.read(folders[index - 1])
        run_stage(recipe, index, model, processor, folders[index])
    return folders[-1]


def make_room_for_kernels(recipe: Recipe) -> None:
    """On a CPU, products in bfloat16 have a kernel for every shape. The 1024 that oneDNN keeps are used up in ten steps
    of pages of mixed shapes, and making one takes as long as it then runs. How many it keeps is read once, when it
    makes the first."""
    if any(stage.precision == "bfloat16" for stage in recipe.stages) and not torch.accelerator.is_available():
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")


def capped(recipe: Recipe, max_steps: int | None) -> Recipe:
    """The recipe with no stage longer than so many steps."""
    if max_steps is None:
        return recipe
    stages = [dataclasses.replace(stage, steps=min(stage.steps or max_steps, max_steps)) for stage in recipe.stages]
    return dataclasses.replace(recipe, stages=stages)


def check_output(output: Path, resume: bool) -> None:
    """Refuse a folder with a run that is not to be continued."""
    if not resume and (output / "recipe.yaml").exists():
        raise InputError(f"{output} already holds a run; continue it with --resume or choose another --output")


def prepare_output(recipe: Recipe, output: Path, resume: bool) -> None:
    """Write the resolved recipe as it now holds, once the run in the folder is found to learn the same."""
    check_output(output, resume)
    saved = output / "recipe.yaml"
    if saved.exists() and (changes := Recipe.load(saved).differences(recipe)):
        shown = "; ".join([*changes[:_SHOWN], *["..."][: len(changes) > _SHOWN]])
        raise InputError(
            f"the run in {output} has another recipe ({shown}); resume with the same recipe and settings, or "
            f"choose another --output"
        )
    make_output(output)
    with replacing(saved) as partial:
        partial.write_text(recipe.dump(), encoding="utf-8")


def run_stage(recipe: Recipe, index: int, model: Any, processor: Any, folder: Path) -> None:
    """Train one stage, from its newest checkpoint if there is one, and write its folder."""
    stage = recipe.stages[index]
    progress = progress_of(folder)
    if stage.adapter is not None:
        model = base_model(recipe, index, model, processor, folder.parent)
    set_seed(recipe.seed + index)
    processor.image_processor.change(**stage.pixels)
    before = folder.with_name(f"{index - 1}-{recipe.stages[index - 1].name}") if index > 0 else None
    trained = build_trained_module(stage, model, processor, before)
    if is_first_process():
        print_parts(f"stage {index}: {stage.name}", trained, stage.learning_rates)
    dataset = in_passes(recipe, index, processor, folder.parent, make_dataset(recipe, index, processor))
    checkpoint = get_last_checkpoint(progress) if progress.exists() else None
    if stage.calibrate and checkpoint is None:
        calibrate(model, [image_of(dataset[sample]).to(model.device) for sample in range(CALIBRATION_SAMPLES)])
    trainer = make_trainer(recipe, index, trained, model, processor, dataset, folder)
    trainer.remove_callback(PrinterCallback)
    bar = ProgressBar(f"{index}-{stage.name}", trainer.counts)
    if is_first_process():
        observe(trainer, stage, index, folder, bar, Assistant(model, processor))
    if stage.attention_supervision:
        enable_attention_supervision(model)
    torch.set_flush_denormal(True)  # numbers that small only cost time
    try:
        if not has_stopped_early(stage, checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.leave_what_counts()
    finally:
        torch.set_flush_denormal(False)
        bar.stop()
    model.config.use_cache = True  # the Trainer turns it off
    heads = detach_heads(model)
    weights = trainer.whole_weights()
    trainer.accelerator.wait_for_everyone()  # each has read what the first removes now
    if is_first_process():
        write_stage(recipe, index, trained, model, processor, folder, weights, heads)
        shutil.rmtree(progress, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def make_trainer(
    recipe: Recipe, index: int, trained: Any, model: Any, processor: Any, dataset: Dataset, folder: Path
) -> StageTrainer:
    """The trainer of a stage, whose folder will be `folder`.

    Args:
        trained: What of the model trains.
        model: The whole model.
        dataset: What it trains on.
    """
    stage, output = recipe.stages[index], folder.parent
    collator = make_collator(stage, processor)
    frozen = make_frozen_stages(recipe, stage, model.model.vision_tower, output)
    if frozen is not None and frozen.store is not None:
        collator = CachedFeatureCollator(collator, frozen.store)
    return StageTrainer(
        recipe,
        stage,
        model.config,
        Skips(output / "skipped.jsonl", stage, distinct_samples(dataset) / process_count()),
        model=trained,
        frozen=frozen,
        args=training_arguments(recipe, stage, progress_of(folder)),
        train_dataset=dataset,
        eval_dataset=make_held_out(recipe, index, processor) if stage.evaluation else None,
        data_collator=collator,
        callbacks=early_stopping_callbacks(stage.evaluation) if stage.evaluation else [],
    )


def progress_of(folder: Path) -> Path:
    """Where a stage keeps its checkpoints until its folder is complete."""
    return folder.with_name(f".{folder.name}.progress")


def observe(
    trainer: StageTrainer, stage: Stage, index: int, folder: Path, bar: ProgressBar, assistant: Assistant
) -> None:
    """Let the first process tell what happens: log.jsonl, the bar, TensorBoard."""
    writer = SummaryWriter(folder.parent / "tensorboard" / folder.name)
    trainer.add_callback(StepLog(folder.parent, stage, index, trainer.counts))
    trainer.add_callback(bar)
    trainer.add_callback(TensorBoardCallback(writer))
    if stage.evaluation is not None and stage.evaluation.pictures and stage.objective == "chat":
        dataset: Any = trainer.eval_dataset
        questions = questions_of(dataset, stage.evaluation.pictures)
        if questions:
            trainer.add_callback(SampleAnswers(assistant, questions, writer))


def write_stage(
    recipe: Recipe,
    index: int,
    trained: Any,
    model: Any,
    processor: Any,
    folder: Path,
    weights: dict[str, Tensor] | None,
    beside: dict[str, dict[str, Tensor]],
) -> None:
    """The stage's folder: a whole checkpoint, or an adapter beside the one that it was trained on."""
    text = recipe.dump()
    if recipe.stages[index].adapter is None:
        checkpoints.write(model, processor, folder, weights=weights, extra_tensors=beside, recipe=text)
        return
    checkpoints.write_adapter(trained, processor, folder, base_folder(recipe, index, folder.parent), recipe=text)


def base_model(recipe: Recipe, index: int, model: Any, processor: Any, output: Path) -> Any:
    """The model that a stage's adapter is trained on, once it is on disk: as it is, or in four bits."""
    adapter, base = recipe.stages[index].adapter, base_folder(recipe, index, output)
    if isinstance(base, Path) and not base.exists() and is_first_process():
        checkpoints.write(model, processor, base)
    wait_for_all()
    if adapter is None or not adapter.four_bit:
        return model
    return checkpoints.read(checkpoints.find(str(base)), quantization=four_bits(recipe.stages[index]))[0]


def base_folder(recipe: Recipe, index: int, output: Path) -> str | Path:
    """What a stage's adapter is trained on: the stage before, the recipe's checkpoint, or what the recipe builds."""
    if index > 0:
        return output / f"{index - 1}-{recipe.stages[index - 1].name}"
    checkpoint = recipe.model.checkpoint
    if checkpoint is None:
        return output / "base"
    return Path(checkpoint) if checkpoints.find(checkpoint) == checkpoint and Path(checkpoint).is_dir() else checkpoint
