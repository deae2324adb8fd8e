"""The Hugging Face Trainer for one stage: learning rates by part, losses of the objectives, whole checkpoints."""

import math
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from convllava.data.collate import POSITION_LABELS, SKIPPED, TARGET_KINDS, lengths_of
from convllava.data.dense_labels import DENSE_METRICS
from convllava.errors import InputError
from convllava.io import one_line
from convllava.model.config import ConvLlavaConfig
from convllava.training.distributed import (
    is_first_process,
    micro_batch_samples,
    micro_batches_per_step,
    process_count,
    sharding_arguments,
)
from convllava.training.eval_callbacks import (
    AVERAGE,
    BEST,
    AverageWeights,
    HeldOutLoss,
    load_weights,
    loss_weight,
    save_weights,
)
from convllava.training.frozen_features import FrozenStages
from convllava.training.logging import SkippedSamples
from convllava.training.memory import explaining_out_of_memory
from convllava.training.muon import Muon
from convllava.training.objectives.attention_supervision import AttentionSupervision, supervised_layers
from convllava.training.objectives.losses import ANSWER_LOSS, answer_loss, answer_weights, prompt_labels, prompt_loss
from convllava.training.optim import parameter_groups
from convllava.training.stage import StageRun

COUNTS = ("samples", "images", "tokens", "positions", "padded", "waited")
"""Counts of a stage (see `StageTrainer._count`): its samples, and the seconds that this process waited for them."""
_DECAY_SHARE = 0.2
"""Share of the steps, at the end, in which the learning rates of the schedule `stable` fall."""


def training_arguments(run: StageRun) -> TrainingArguments:
    """Return the Trainer's settings for a stage, whose number of steps is known."""
    recipe, stage = run.recipe, run.stage
    assert stage.steps is not None
    on_cpu, samples = not torch.accelerator.is_available(), micro_batch_samples(stage, process_count())
    schedule: dict[str, Any] = {"lr_scheduler_type": stage.schedule}
    if stage.schedule == "stable":
        decay = {"num_decay_steps": round(_DECAY_SHARE * stage.steps), "decay_type": "linear"}
        schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
    elif stage.schedule == "constant":
        schedule = {"lr_scheduler_type": "constant_with_warmup"}
    evaluation: dict[str, Any] = {}
    if stage.evaluation is not None:
        evaluation = {
            "eval_strategy": "steps",
            "eval_steps": stage.evaluation.every,
            # With a budget one by one: the costs of held-out samples are not measured.
            "per_device_eval_batch_size": 1 if stage.budget else samples,
            "prediction_loss_only": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,
        }
    return TrainingArguments(
        output_dir=str(run.progress),
        max_steps=stage.steps,
        # With a budget an item of the dataset is a whole micro-batch.
        per_device_train_batch_size=1 if stage.budget else samples,
        gradient_accumulation_steps=micro_batches_per_step(stage, process_count()),
        **schedule,
        warmup_steps=round(stage.warmup * stage.steps),
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bfloat16",
        gradient_checkpointing=stage.gradient_checkpointing,
        logging_steps=1,
        save_steps=recipe.save_every,
        seed=recipe.seed,
        disable_tqdm=True,
        dataloader_num_workers=recipe.workers,
        dataloader_persistent_workers=recipe.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and process_count() > 1 else None,
        report_to=recipe.report_to,
        **evaluation,
        **sharding_arguments(recipe),
        ddp_find_unused_parameters=True,  # some objectives do not use every trained parameter in every step
    )


class SaveByRecipe(TrainerCallback):
    """Saves as often as the current recipe says. The Trainer would use the number in a resumed run's checkpoint
    instead."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.save_steps = int(args.save_steps)


class StageTrainer(Trainer):
    """The Hugging Face Trainer with a learning rate per part, samples in the recipe's order, and checkpoints that are
    complete or absent.

    Args:
        run: The stage.
        config: Configuration of the whole model. Some objectives train a part of it with their own heads.
        skips: Records samples that were skipped.
        model: The module that trains.
        frozen: Frozen stages of the tower that run without gradients, if any.
        keywords: Arguments of `Trainer`.
    """

    def __init__(
        self,
        run: StageRun,
        config: ConvLlavaConfig,
        skips: SkippedSamples,
        *,
        model: nn.Module,
        frozen: FrozenStages | None = None,
        **keywords: Any,
    ) -> None:
        self.recipe, self.stage, self.config, self.skips, self.trained = run.recipe, run.stage, config, skips, model
        self.frozen = frozen
        self.staging: str | None = None
        self.counts: dict[str, float] = dict.fromkeys(COUNTS, 0)
        self.step_metrics: dict[str, float] = {}
        self.held_out = HeldOutLoss()
        self.supervised_layers = supervised_layers(model) if self.stage.attention_supervision else {}
        super().__init__(model=model, args=training_arguments(run), **keywords)
        self.add_callback(SaveByRecipe())
        # Only here, because the Trainer has now moved the weights to their device.
        self.average = AverageWeights(model, self.stage.ema) if self.stage.ema else None
        if self.average is not None:
            self.add_callback(self.average)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.trained, self.stage)
            beta2 = self.stage.adam_beta2
            if self.stage.optimizer == "muon":
                self.optimizer = Muon(groups, betas=(0.95, beta2), precision=getattr(torch, self.stage.precision))
            else:
                self.optimizer = torch.optim.AdamW(groups, betas=(0.9, beta2))
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """Keep the order of the samples, which is random already and part of the recipe."""
        samples: Any = train_dataset or self.train_dataset
        return SequentialSampler(samples)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.counts["waited"] += time.perf_counter() - started
        return batches

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        with explaining_out_of_memory(self.recipe, self.stage, self.trained, self.config, inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        skipped = inputs.pop(SKIPPED, ())
        training = self.trained.training
        self.skips.note(skipped, self.state.global_step + training, held_out=not training)
        if self.frozen is not None:
            inputs = self.frozen.encode(inputs)
        if training:
            self._count(inputs)
        # With causal attention no supervised token sees the padding on the right, and no mask is faster.
        mask = inputs.pop("attention_mask", None)
        targets = {kind: inputs.pop(f"{kind}_targets", None) for kind in TARGET_KINDS}  # generated pages have all kinds
        page_labels = inputs.pop(POSITION_LABELS, ())
        supervision = None
        if self.stage.attention_supervision and training:
            supervision = AttentionSupervision(self.supervised_layers, targets, page_labels)
            inputs["attention_supervision"] = supervision
            if page_labels:
                inputs["output_hidden_states"] = True
        if self.stage.answer_length_weighting or self.stage.prompt_loss_weight or supervision is not None:
            labels, prompts = inputs.pop("labels"), None
            if self.stage.prompt_loss_weight and training:
                ids, positions = inputs["input_ids"], inputs.get("position_ids")
                prompts = prompt_labels(ids, labels, self.config.image_token_id, mask, positions)
            outputs = model(**inputs)
            loss = self._chat_loss(outputs, labels, supervision, prompts)
        else:
            loss, outputs = super().compute_loss(model, inputs, *args, **{**kwargs, "return_outputs": True})
            found = {name: outputs[name].item() for name in DENSE_METRICS if name in outputs}
            self.step_metrics = {name: value for name, value in found.items() if math.isfinite(value)}
        return (loss, outputs) if kwargs.get("return_outputs") else loss

    def _count(self, inputs: Mapping[str, Any]) -> None:
        """Count samples, images and tokens of all processes, assuming that each has as many as this one; the positions
        that the language model computes; and those that it would compute if the samples were padded."""
        lengths, images, mask = lengths_of(inputs), len(inputs.get("pixel_values", ())), "attention_mask" in inputs
        found = {
            "samples": len(lengths) or images,
            "images": images,
            "tokens": sum(lengths),
            "positions": inputs["input_ids"].numel() if lengths else 0,
            "padded": inputs["input_ids"].numel() if mask else len(lengths) * max(lengths, default=0),
        }
        for name, count in found.items():
            self.counts[name] += count * self.args.world_size

    def _chat_loss(
        self, outputs: Any, labels: Tensor, supervision: AttentionSupervision | None, prompts: Tensor | None = None
    ) -> Tensor:
        """Return the sum of the losses of answers, prompts, attention supervision and auxiliary heads.

        Each is a mean within one micro-batch of one process, and these are averaged. Only the plain loss of `chat` is a
        mean over the whole batch.
        """
        logits, weights = outputs["logits"], answer_weights(labels, self.stage.answer_length_weighting)
        loss = answer_loss(logits, labels, weights)
        if self.trained.training:
            # Comparable between stages with different weights of the other losses.
            self.step_metrics = {ANSWER_LOSS: loss.item()}
        if prompts is not None:
            loss = loss + self.stage.prompt_loss_weight * prompt_loss(logits, prompts)
        if supervision is not None:
            attention = {kind: supervision.loss(kind, weights) for kind in supervision.layers}
            self.step_metrics |= {f"{kind}_attention": value.item() for kind, value in attention.items()}
            loss = loss + self.stage.attention_supervision * torch.stack(list(attention.values())).sum()
        if "auxiliary" in outputs:
            found = outputs["auxiliary"]
            losses = {"loss": self.stage.position_label_weight, "character_loss": self.stage.character_label_weight}
            self.step_metrics |= {
                name: found[name].item() for name in found.keys() - losses.keys() if found[name].isfinite()
            }
            loss = loss + sum(weight * found[name] for name, weight in losses.items() if name in found)
        return loss / (self.args.gradient_accumulation_steps if self.trained.training else 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.step_metrics} if "loss" in logs else logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Loaders draw seeds; an evaluation must not change later random draws of the training.
        with torch.random.fork_rng(devices=[]), self.average.in_model() if self.average else nullcontext():
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute only the loss, with every objective's labels, and add it to the held-out loss."""
        inputs = self._prepare_inputs(inputs)
        # accelerate fills the last batches with samples of the beginning, so that all processes have the same number.
        state, own = self.accelerator.gradient_state, self.args.per_device_eval_batch_size
        if state.end_of_dataloader and state.remainder > 0:
            own = min(max(state.remainder - self.args.process_index * own, 0), own)
        weight = loss_weight(inputs, own)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
        self.held_out.add(loss, weight)
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.held_out = HeldOutLoss()
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        return output._replace(metrics={**output.metrics, "eval_loss": self.held_out.mean(self.accelerator)})

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)

    def use_final_weights(self) -> None:
        """After training: load the weights with the smallest held-out loss, or the averages, if the stage has them."""
        best = Path(str(self.args.output_dir)) / BEST
        if self.stage.evaluation is not None and self.stage.evaluation.patience is not None and best.exists():
            load_weights(dict(self.trained.named_parameters()), best)
        elif self.average is not None:
            self.average.swap()

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Return the weights of a sharded model; None if each process has a whole one. All processes must call this."""
        if not self.is_sharded:
            return None
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        for tied in getattr(self.trained, "all_tied_weights_keys", {}):
            weights.pop(tied, None)
        return weights

    @property
    def is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and is_first_process():
            save_weights(self.average.averages, Path(output_dir) / AVERAGE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            load_weights(self.average.averages, Path(checkpoint) / AVERAGE)

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the Trainer write to a temporary folder and rename it, so that a kill leaves no incomplete checkpoint.

        Raises:
            InputError: if it cannot be written, as on a full disk; the previous checkpoint survives.
        """
        name = f"checkpoint-{self.state.global_step}"
        home = Path(super()._get_output_dir(trial))
        self.staging = str(home / "partial")
        if is_first_process():
            shutil.rmtree(self.staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if type(error) is RuntimeError and "PytorchStreamWriter" not in str(error):
                raise  # torch has no error type for a failed write
            shutil.rmtree(self.staging, ignore_errors=True)
            last = get_last_checkpoint(home)
            kept = f"step {last.rpartition('-')[2]} is still there" if last else "this stage has no earlier one"
            raise InputError(
                f"the checkpoint of step {self.state.global_step} cannot be written in {home}: {one_line(error)}; "
                f"{kept}; the disk has {shutil.disk_usage(home).free / 1e9:.1f} GB free; make room and `resume`"
            ) from error
        finally:
            staged, self.staging = Path(self.staging), None
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if is_first_process():
            older = list(home.glob("checkpoint-*"))
            (staged / name).rename(home / name)
            for folder in older:
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
