"""What happens at each evaluation while a stage trains: the best weights are kept, and some answers are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from convllava.data.collate import IGNORE, supervise_first
from convllava.display import AnsweredImage, draw_answers
from convllava.errors import InputError
from convllava.inference import Assistant, Message
from convllava.training.averaging import save_weights
from convllava.training.datasets import Question
from convllava.training.recipe import Evaluation, Stage

BEST = "best.safetensors"
"""Among a stage's checkpoints: the weights that had the smallest held-out loss."""


_LONGEST = 48
"""Tokens of an answer that is drawn."""


class HeldOutLoss:
    """The loss over several batches and all processes: its mean over supervised tokens, or over samples where there are
    none, as in labels of cells."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, loss: Tensor, weight: int) -> None:
        """The mean loss of a batch with so many tokens; with none it says nothing."""
        if weight:
            self.total += float(loss) * weight
            self.weight += weight

    def mean(self, accelerator: Accelerator) -> float:
        """All processes must ask."""
        sums = torch.tensor([self.total, self.weight], device=accelerator.device)
        total, weight = accelerator.reduce(sums, "sum").tolist()
        return total / weight if weight else math.nan


def weight_of(batch: Mapping[str, Any], samples: int) -> int:
    """What the first samples of a batch count; the labels of the others, which fill it up, are taken away."""
    if "input_ids" not in batch:
        return samples
    supervise_first(batch, samples)
    return int((batch["labels"][:, 1:] != IGNORE).sum())


class BestWeights(TrainerCallback):
    """Keeps the weights of the smallest held-out loss."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        # The Trainer notes the new best only after this.
        is_best = state.best_metric is None or metrics["eval_loss"] < state.best_metric
        if is_best and state.is_world_process_zero:
            weights = kwargs["model"].named_parameters()
            folder = Path(str(args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_weights({name: weight for name, weight in weights if weight.requires_grad}, folder / BEST)


class SampleAnswers(TrainerCallback):
    """Answers the first question of some held-out samples and draws them in TensorBoard; of those that cannot be asked,
    as where the prompt leaves no room for an answer, there is no picture.

    Args:
        assistant: The model that trains, ready to answer.
        questions: What to ask.
        writer: Of the stage.
    """

    def __init__(self, assistant: Assistant, questions: Sequence[Question], writer: SummaryWriter) -> None:
        self.assistant, self.questions, self.writer = assistant, questions, writer

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        answered = [found for messages, truth in self.questions if (found := self._answered(messages, truth))]
        if answered:
            sheet = np.asarray(draw_answers(answered))
            self.writer.add_image("answers", sheet, state.global_step, dataformats="HWC")

    def _answered(self, messages: list[dict[str, Any]], truth: str) -> AnsweredImage | None:
        parts = [part for message in messages for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        asked = [Message(role=message["role"], content=message["content"]) for message in messages]
        try:
            answer = self.assistant.chat(asked, images, max_new_tokens=_LONGEST)
        except InputError:
            return None  # an illustration stops no training
        question = " ".join(part["text"].strip() for part in parts if part["type"] == "text")
        return AnsweredImage(images[0], [(question, f"{answer}   ({truth})")], [])


def has_stopped(stage: Stage, checkpoint: str | None) -> bool:
    """Whether the stage had stopped early when its newest checkpoint was written: it then only lacks its folder."""
    if checkpoint is None or stage.evaluation is None or stage.evaluation.patience is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    found = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
    return found.get("attributes", {}).get("early_stopping_patience_counter", 0) >= stage.evaluation.patience


def callbacks_of(evaluation: Evaluation) -> list[TrainerCallback]:
    """What keeps the best weights and stops early, where the evaluation asks for it."""
    if evaluation.patience is None:
        return []
    return [EarlyStoppingCallback(evaluation.patience), BestWeights()]
