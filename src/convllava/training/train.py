"""Train a recipe, stage after stage, with a small subclass of the Hugging Face Trainer.

    convllava train recipes/tiny-quick.yaml --output runs/quick [--resume]
    torchrun --nproc-per-node 2 -m convllava train recipes/tiny-quick.yaml --output runs/quick

The output folder has everything: `recipe.yaml` (with all defaults), `log.jsonl` (one line per optimiser step),
`tensorboard/`, and one folder for each complete stage, `1-NAME/`: a loadable checkpoint with the recipe, and the
auxiliary heads that the next stage continues with. A stage in progress has `.1-NAME.progress/checkpoint-STEP/`, from
which a run can be resumed exactly.
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from convllava import checkpoints
from convllava.errors import ConfigError
from convllava.inference import Assistant
from convllava.io import make_output, replacing
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.training.batch_costs import in_micro_batches, plan_steps
from convllava.training.datasets import (
    check_files,
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
from convllava.training.initialise import calibrate, initial_model
from convllava.training.logging import ProgressBar, SkippedSamples, StepLog, print_parts
from convllava.training.lora import four_bit_config
from convllava.training.objectives.attention_supervision import enable_attention_supervision
from convllava.training.objectives.auxiliary_heads import detach_heads
from convllava.training.objectives.build import build_trained_module
from convllava.training.recipe import Recipe
from convllava.training.stage import StageRun, resolve_stages
from convllava.training.trainer import StageTrainer
from convllava.training.validate import check_model, check_recipe

CALIBRATION_SAMPLES = 32
_LISTED_DIFFERENCES = 6
"""Differences between two recipes that a message lists."""


def train(recipe: Recipe, output: str | Path, *, resume: bool = False, max_steps: int | None = None) -> Path:
    """Train every stage of a recipe that is not complete yet.

    Args:
        recipe: The recipe.
        output: Folder for checkpoints and logs.
        resume: Continue the run in the folder; its recipe must be the same.
        max_steps: Most steps of each stage, to try a recipe.

    Returns:
        The folder of the last stage's checkpoint.

    Raises:
        InputError: if the folder has another run, a file is missing, or the recipe does not fit the model.
    """
    output = Path(output)
    saved = output / "recipe.yaml"
    check_processes(recipe, process_count())
    if is_first_process() and saved.exists() and not resume:
        raise ConfigError(f"{output} already holds a run; continue it with `resume`, or choose another `output`")

    # 1. Steps of each stage. Stages with epochs or a budget read their files for it.
    check_files(recipe)
    recipe = plan_steps(recipe, output)
    if max_steps is not None:
        stages = [dataclasses.replace(stage, steps=min(stage.steps or max_steps, max_steps)) for stage in recipe.stages]
        recipe = dataclasses.replace(recipe, stages=stages)

    # 2. The model before the first stage.
    set_seed(recipe.seed)
    if any(stage.precision == "bfloat16" for stage in recipe.stages) and not torch.accelerator.is_available():
        # In bfloat16, oneDNN compiles a kernel for every shape, which takes as long as running it. Pages of mixed
        # shapes fill its default cache of 1024 kernels in ten steps. It reads this setting before the first kernel.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    announce(f"recipe {recipe.name}: build the model")
    model, processor = initial_model(recipe)

    # 3. Anything that would stop a later stage stops the run now, before a file is written.
    runs = resolve_stages(recipe, processor, output)
    check_recipe(recipe, process_count())
    for run in runs:
        check_model(run, model)
    if is_first_process():
        if saved.exists() and (differences := Recipe.load(saved).differences(recipe)):
            listed = "; ".join([*differences[:_LISTED_DIFFERENCES], *["..."][: len(differences) > _LISTED_DIFFERENCES]])
            raise ConfigError(
                f"the run in {output} has another recipe ({listed}); resume with the same recipe and settings, or "
                "choose another `output`"
            )
        make_output(output)
        with replacing(saved) as partial:
            partial.write_text(recipe.dump(), encoding="utf-8")

    # 4. The stages after the last complete one; users may delete the folders of earlier stages.
    complete = [run.index for run in runs if run.folder.exists()]
    for run in runs[1 + max(complete, default=-1) :]:
        if run.previous is not None:
            # From the folder, not from memory, so that a resumed run starts from the same weights as this one.
            model, _ = checkpoints.read(run.previous)
        train_stage(run, model)
    return runs[-1].folder


def train_stage(run: StageRun, model: ConvLlavaForConditionalGeneration) -> None:
    """Train one stage, from its newest checkpoint if it has one, and write its folder."""
    stage, processor, output = run.stage, run.processor, run.output
    announce(f"stage {run.index + 1} of {len(run.recipe.stages)}, {stage.name}: {stage.steps} steps")

    # 1. The modules that train: the model, parts of it with an objective's heads, or an adapter.
    if stage.adapter is not None:
        if isinstance(run.base, Path) and not run.base.exists() and is_first_process():
            checkpoints.write(model, processor, run.base)
        wait_for_all()
        if stage.adapter.four_bit:
            model, _ = checkpoints.read(checkpoints.find(str(run.base)), quantization=four_bit_config(stage))
    set_seed(run.recipe.seed + run.index)
    trained: Any = build_trained_module(stage, model, processor, run.previous)
    if is_first_process():
        print_parts(f"stage {run.index}: {stage.name}", trained, stage.learning_rates)

    # 2. The samples.
    dataset = in_micro_batches(run, make_dataset(run))
    held_out: Any = make_held_out(run) if stage.evaluation is not None else None
    checkpoint = get_last_checkpoint(run.progress) if run.progress.exists() else None
    if stage.calibrate and checkpoint is None:
        calibrate(model, [image_of(dataset[sample]).to(model.device) for sample in range(CALIBRATION_SAMPLES)])
    collator = make_collator(stage, processor)
    frozen = make_frozen_stages(run.recipe, stage, model.model.vision_tower, output)
    if frozen is not None and frozen.store is not None:
        collator = CachedFeatureCollator(collator, frozen.store)

    # 3. The trainer, and what it reports.
    trainer = StageTrainer(
        run,
        model.config,
        SkippedSamples(output / "skipped.jsonl", stage, distinct_samples(dataset) / process_count()),
        model=trained,
        frozen=frozen,
        train_dataset=dataset,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=early_stopping_callbacks(stage.evaluation) if stage.evaluation is not None else [],
    )
    trainer.remove_callback(PrinterCallback)
    bar = ProgressBar(run.folder.name, trainer.counts)
    if is_first_process():
        writer = SummaryWriter(output / "tensorboard" / run.folder.name)
        for callback in (StepLog(output, stage, run.index, trainer.counts), bar, TensorBoardCallback(writer)):
            trainer.add_callback(callback)
        pictures = stage.evaluation.pictures if stage.evaluation is not None and stage.objective == "chat" else 0
        if pictures and (questions := questions_of(held_out, pictures)):
            trainer.add_callback(SampleAnswers(Assistant(model, processor), questions, writer))
    if stage.attention_supervision:
        enable_attention_supervision(model)

    # 4. Training.
    if checkpoint is not None:
        announce(f"continue from {checkpoint}")
    torch.set_flush_denormal(True)  # denormal numbers are slow and change nothing
    try:
        if not has_stopped_early(stage, checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.use_final_weights()
    finally:
        torch.set_flush_denormal(False)
        bar.stop()

    # 5. The stage's folder: a whole checkpoint, or an adapter with the name of its base.
    model.config.use_cache = True  # the Trainer turns it off
    heads = detach_heads(model)
    weights = trainer.whole_weights()
    trainer.accelerator.wait_for_everyone()  # every process has read the files that the first one now deletes
    if is_first_process():
        if stage.adapter is None:
            text = run.recipe.dump()
            checkpoints.write(model, processor, run.folder, weights=weights, extra_tensors=heads, recipe=text)
        else:
            checkpoints.write_adapter(trained, processor, run.folder, run.base, recipe=run.recipe.dump())
        shutil.rmtree(run.progress, ignore_errors=True)
        announce(f"wrote {run.folder}")
    trainer.accelerator.wait_for_everyone()


def announce(text: str) -> None:
    """Print a line about the next step, once for all processes."""
    if is_first_process():
        print(text, flush=True)
