"""Runs a recipe: stage after stage through a small subclass of the Hugging Face Trainer.

    convllava train recipes/tiny-quick.yaml --output runs/quick [--resume]
    torchrun --nproc-per-node 2 -m convllava train recipes/tiny-quick.yaml --output runs/quick

Everything lies in the output folder: `recipe.yaml` (resolved), `log.jsonl` (one line an optimiser step), `tensorboard/`
and one folder per stage, `1-NAME/`, which is a loadable checkpoint with the recipe beside it and appears when the stage
is complete. A stage in progress keeps `.1-NAME.progress/checkpoint-STEP/`, from which `--resume` continues exactly.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from torch.utils.tensorboard import SummaryWriter
from transformers import CONFIG_MAPPING, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from convllava import checkpoints
from convllava.building import build_fresh
from convllava.configuration import ConvLlavaVisionConfig
from convllava.data.cells import ACCURACIES, AlignDataset, DenseDataset, collate_dense
from convllava.data.conversation import GUIDES, collate
from convllava.data.synthetic import ChatDataset
from convllava.errors import InputError
from convllava.image_processing import ConvLlavaImageProcessorPil
from convllava.modeling import ConvLlavaForConditionalGeneration
from convllava.processing import ConvLlavaProcessor
from convllava.synthetic import World, closed_vocabulary
from convllava.training.alignment import Alignment, vocabulary_of
from convllava.training.attention import Guidance, check_guidable, guide_attention, guided_layers
from convllava.training.calibration import calibrate
from convllava.training.dense import DensePretraining
from convllava.training.losses import answer_loss, answer_weights
from convllava.training.muon import Muon
from convllava.training.parts import freeze_all_but, parameter_groups
from convllava.training.recipe import Data, ModelSpec, Recipe, Stage, dump_recipe, load_recipe
from convllava.training.reporting import ProgressBar, StepLog, print_parts

CALIBRATION_SAMPLES = 32


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
    if max_steps is not None:
        stages = [dataclasses.replace(stage, steps=min(stage.steps, max_steps)) for stage in recipe.stages]
        recipe = dataclasses.replace(recipe, stages=stages)
    check_processes(recipe, process_count())
    set_seed(recipe.seed)
    model, processor = start(recipe)
    check_stages(recipe, model, processor)
    if is_first_process():
        prepare_output(recipe, output, resume)
    folders = [output / f"{index}-{stage.name}" for index, stage in enumerate(recipe.stages)]
    done = sum(folder.exists() for folder in folders)
    for index in range(done, len(folders)):
        if index > 0:
            # From the folder and not from memory, so that a resumed run sees what an uninterrupted one saw.
            model, processor = checkpoints.read(folders[index - 1])
        run_stage(recipe, index, model, processor, folders[index])
    return folders[-1]


def check_stages(recipe: Recipe, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor) -> None:
    """Refuse, before anything is written, what would stop a later stage.

    Raises:
        InputError: a part that the model does not have, or a world that cannot be drawn.
    """
    for stage in recipe.stages:
        freeze_all_but(trained_module(stage, model, processor), stage.trains)
        make_world(stage.data, seed=0)
        if stage.guidance:
            check_guidable(model)


def process_count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def check_processes(recipe: Recipe, processes: int) -> None:
    """Refuse a batch that the processes cannot share.

    Raises:
        InputError: names the stage.
    """
    for stage in recipe.stages:
        if stage.batch_size % (stage.accumulate * processes):
            raise InputError(
                f"stage {stage.name}: batch_size {stage.batch_size} does not divide among {processes} processes "
                f"with accumulate {stage.accumulate}; make it a multiple of {stage.accumulate * processes}"
            )


def trained_module(stage: Stage, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor) -> nn.Module:
    """What the Trainer trains: the model, or parts of it under heads that are thrown away."""
    if stage.objective == "dense":
        return DensePretraining(model.model.vision_tower)
    if stage.objective == "align":
        return Alignment(model, vocabulary_of(processor.tokenizer))
    return model


def prepare_output(recipe: Recipe, output: Path, resume: bool) -> None:
    """Write the resolved recipe, or check that the run in the folder has the same one."""
    saved = output / "recipe.yaml"
    if saved.exists():
        if not resume:
            raise InputError(f"{output} already holds a run; continue it with --resume or choose another --output")
        if load_recipe(saved) != recipe:
            raise InputError(f"{saved} differs from the recipe given; resume with the same recipe and settings")
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output} cannot be a folder: {error.strerror}") from None
    partial = saved.with_suffix(".partial")
    partial.write_text(dump_recipe(recipe), encoding="utf-8")
    partial.replace(saved)


def start(recipe: Recipe) -> checkpoints.Parts:
    """The model that the first stage receives."""
    spec = recipe.model
    if spec.checkpoint is not None:
        return checkpoints.read(spec.checkpoint)
    check_settings(spec)
    return build_fresh(
        vision=spec.vision,
        language=spec.language,
        pixels=spec.pixels,
        words=closed_vocabulary(),
        row_separator=spec.row_separator,
        coordinate_embedding=spec.coordinate_embedding,
        seed=recipe.seed,
    )


def check_settings(spec: ModelSpec) -> None:
    """Refuse settings that the configurations do not have: they would be kept and have no effect.

    Raises:
        InputError: names the nearest known setting.
    """
    family = spec.language.get("model_type", "llama")
    if family not in CONFIG_MAPPING:
        raise InputError(f"model.language: transformers knows no model_type {family!r}")
    sections: dict[str, tuple[dict[str, Any], type]] = {
        "vision": (spec.vision, ConvLlavaVisionConfig),
        "language": (spec.language, CONFIG_MAPPING[family]),
        "pixels": (spec.pixels, ConvLlavaImageProcessorPil),
    }
    for section, (settings, kind) in sections.items():
        known = set(dir(kind)) | set(inspect.signature(kind).parameters)
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(f"model.{section}: there is no setting {key!r}{hint}")


def run_stage(recipe: Recipe, index: int, model: Any, processor: Any, folder: Path) -> None:
    """Train one stage, from its newest checkpoint if there is one, and write its folder."""
    stage = recipe.stages[index]
    progress = folder.with_name(f".{folder.name}.progress")
    set_seed(recipe.seed + index)
    trained = trained_module(stage, model, processor)
    freeze_all_but(trained, stage.trains)
    if is_first_process():
        print_parts(f"stage {index}: {stage.name}", trained, stage.trains)
    dataset = make_dataset(recipe, index, processor)
    checkpoint = get_last_checkpoint(progress) if progress.exists() else None
    if stage.calibrate and checkpoint is None:
        calibrate(model, [image_of(dataset[sample]).to(model.device) for sample in range(CALIBRATION_SAMPLES)])
    trainer = StageTrainer(
        stage,
        model=trained,
        args=training_arguments(recipe, stage, progress),
        train_dataset=dataset,
        data_collator=make_collator(stage, processor),
    )
    trainer.remove_callback(PrinterCallback)
    bar = ProgressBar(f"{index}-{stage.name}")
    if is_first_process():
        trainer.add_callback(StepLog(folder.parent, stage, index, trainer.counts))
        trainer.add_callback(bar)
        trainer.add_callback(TensorBoardCallback(SummaryWriter(folder.parent / "tensorboard" / folder.name)))
    if stage.guidance:
        guide_attention(model)
    torch.set_flush_denormal(True)  # numbers that small only cost time
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        torch.set_flush_denormal(False)
        bar.stop()
    model.config.use_cache = True  # the Trainer turns it off
    if is_first_process():
        checkpoints.write(model, processor, folder, recipe=dump_recipe(recipe))
        shutil.rmtree(progress, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def make_dataset(recipe: Recipe, index: int, processor: Any) -> Dataset:
    """As many samples as the stage has steps for, of the training split; every stage has a seed of its own."""
    stage, data = recipe.stages[index], recipe.stages[index].data
    world = make_world(data, seed=1000 * recipe.seed + index)
    length = stage.steps * stage.batch_size
    if stage.objective == "dense":
        return DenseDataset(world, processor, length, sheets=data.sheets)
    if stage.objective == "align":
        return AlignDataset(world, processor, length, sheets=data.sheets, stride=processor.image_processor.stride)
    return ChatDataset(world, processor, length, captions=data.captions, images=data.images, guided=stage.guidance > 0)


def image_of(item: dict[str, Tensor]) -> Tensor:
    """The first image of a dataset's item, (3, height, width)."""
    pixels = item["pixel_values"]
    return pixels if pixels.ndim == 3 else pixels[0]


def make_world(data: Data, seed: int) -> World:
    """The training split of the generated world that a stage's data names."""
    return World("train", seed=seed, size=data.size, kinds=data.kinds, simple=data.simple, turns=data.turns)


def make_collator(stage: Stage, processor: Any) -> Any:
    if stage.objective != "chat":
        return collate_dense
    return partial(collate, pad_token_id=processor.tokenizer.pad_token_id)


def training_arguments(recipe: Recipe, stage: Stage, progress: Path) -> TrainingArguments:
    on_cpu = not torch.accelerator.is_available()
    return TrainingArguments(
        output_dir=str(progress),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size // stage.accumulate // process_count(),
        gradient_accumulation_steps=stage.accumulate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(stage.schedule, stage.schedule),
        warmup_steps=round(stage.warmup * stage.steps),
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bfloat16",
        gradient_checkpointing=stage.gradient_checkpointing,
        logging_steps=1,
        save_steps=recipe.save_every,
        save_total_limit=1,
        seed=recipe.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=recipe.workers,
        dataloader_persistent_workers=recipe.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and process_count() > 1 else None,
        ddp_find_unused_parameters=True,  # an objective may leave parts of what trains alone for a step
    )


class StageTrainer(Trainer):
    """The Hugging Face Trainer with a learning rate per part, samples in order, and checkpoints that are whole.

    Args:
        stage: What trains, at which rates.
        keywords: As of `Trainer`.
    """

    def __init__(self, stage: Stage, *, model: nn.Module, **keywords: Any) -> None:
        self.stage, self.trained = stage, model
        self.staging: str | None = None
        self.counts = {"images": 0, "tokens": 0}
        self.notes: dict[str, float] = {}
        self.guided_layers = guided_layers(model) if stage.guidance else {}
        super().__init__(model=model, **keywords)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            is_muon = self.stage.optimizer == "muon"
            groups = parameter_groups(self.trained, self.stage.trains, self.stage.weight_decay, is_muon)
            betas = (0.95 if is_muon else 0.9, self.stage.adam_beta2)
            self.optimizer = Muon(groups, betas=betas) if is_muon else torch.optim.AdamW(groups, betas=betas)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """The world is drawn at random already; its order is then part of the recipe."""
        samples: Any = train_dataset or self.train_dataset
        return SequentialSampler(samples)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._count(inputs)
        # Right-padded and causal: nothing that is supervised sees the padding, and attention is faster without a mask.
        inputs.pop("attention_mask", None)
        guidance = self._guidance(inputs)
        if self.stage.balance or guidance is not None:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = self._chat_loss(outputs["logits"], labels, guidance)
        else:
            loss, outputs = super().compute_loss(model, inputs, *args, **{**kwargs, "return_outputs": True})
            notes = {name: outputs[name].item() for name in ACCURACIES if name in outputs}
            self.notes = {name: value for name, value in notes.items() if math.isfinite(value)}
        return (loss, outputs) if kwargs.get("return_outputs") else loss

    def _count(self, inputs: Mapping[str, Any]) -> None:
        """Images and tokens of all processes, which have as many each, more or less."""
        tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else 0
        self.counts["images"] += len(inputs.get("pixel_values", ())) * self.args.world_size
        self.counts["tokens"] += tokens * self.args.world_size

    def _guidance(self, inputs: dict[str, Any]) -> Guidance | None:
        """Take the guides out of the batch and put into it what records where attention looks."""
        found = {kind: inputs.pop(f"{kind}_guides", None) for kind in GUIDES}
        if not self.stage.guidance:
            return None
        inputs["guidance"] = Guidance({layer: found[kind] for kind, layer in self.guided_layers.items()})
        return inputs["guidance"]

    def _chat_loss(self, logits: Tensor, labels: Tensor, guidance: Guidance | None) -> Tensor:
        """The loss of balanced answers, and attention guidance.

        Both are means within one pass of one process, which are then averaged; only the plain loss of `chat` is a mean
        over the whole batch, however it is shared.
        """
        weights = answer_weights(labels, self.stage.balance)
        loss = answer_loss(logits, labels, weights)
        if guidance is not None:
            looks = {kind: guidance.loss(layer, weights) for kind, layer in self.guided_layers.items()}
            self.notes = {f"{kind}_guidance": value.item() for kind, value in looks.items()}
            loss = loss + self.stage.guidance * torch.stack(list(looks.values())).sum()
        return loss / self.args.gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.notes}, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the Trainer write beside, then rename: a killed run never leaves half a checkpoint that looks whole."""
        name = f"checkpoint-{self.state.global_step}"
        home = Path(super()._get_output_dir(trial))
        self.staging = str(home / "partial")
        if is_first_process():
            shutil.rmtree(self.staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staged, self.staging = Path(self.staging), None
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if is_first_process():
            older = list(home.glob("checkpoint-*"))
            (staged / name).rename(home / name)
            for folder in older:
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
