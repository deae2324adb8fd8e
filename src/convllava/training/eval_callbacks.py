"""Evaluation while a stage trains: held-out loss, best weights, early stopping, averaged weights, drawn answers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from convllava.data.collate import IGNORE, supervise_first
from convllava.display import AnsweredImage, draw_answers
from convllava.errors import InputError
from convllava.inference import Assistant, Message
from convllava.io import replacing
from convllava.training.datasets import Question
from convllava.training.recipe import Evaluation, Stage

BEST = "best.safetensors"
"""The file with the weights of the smallest held-out loss, in the folder of a stage's checkpoints."""
AVERAGE = "average.safetensors"
"""The file with the averaged weights, in a checkpoint's folder."""
_MAX_ANSWER_TOKENS = 48
"""Length of an answer that is drawn."""


class HeldOutLoss:
    """The mean held-out loss over several batches and all processes.

    It is the mean over supervised tokens, or over samples if there are none, as with dense labels.
    """

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, loss: Tensor, weight: int) -> None:
        """Add the mean loss of a batch with this number of tokens; a batch without tokens does not count."""
        if weight:
            self.total += float(loss) * weight
            self.weight += weight

    def mean(self, accelerator: Accelerator) -> float:
        """Return the mean; all processes must call this."""
        sums = torch.tensor([self.total, self.weight], device=accelerator.device)
        total, weight = accelerator.reduce(sums, "sum").tolist()
        return total / weight if weight else math.nan


def loss_weight(batch: Mapping[str, Any], samples: int) -> int:
    """Return the supervised tokens of the first samples of a batch, and remove the labels of the others."""
    if "input_ids" not in batch:
        return samples
    supervise_first(batch, samples)
    return int((batch["labels"][:, 1:] != IGNORE).sum())


class BestWeights(TrainerCallback):
    """Saves the weights with the smallest held-out loss."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        # The Trainer updates `best_metric` only after this.
        is_best = state.best_metric is None or metrics["eval_loss"] < state.best_metric
        if is_best and state.is_world_process_zero:
            weights = kwargs["model"].named_parameters()
            folder = Path(str(args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_weights({name: weight for name, weight in weights if weight.requires_grad}, folder / BEST)


class SampleAnswers(TrainerCallback):
    """Answers the first question of some held-out samples, and draws the answers in TensorBoard.

    A sample whose question cannot be asked, for example because its prompt leaves no room for an answer, is left out.

    Args:
        assistant: The model that trains.
        questions: The questions.
        writer: The TensorBoard writer of the stage.
    """

    def __init__(self, assistant: Assistant, questions: Sequence[Question], writer: SummaryWriter) -> None:
        self.assistant, self.questions, self.writer = assistant, questions, writer

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        answered = [found for messages, truth in self.questions if (found := self._answer(messages, truth))]
        if answered:
            sheet = np.asarray(draw_answers(answered))
            self.writer.add_image("answers", sheet, state.global_step, dataformats="HWC")

    def _answer(self, messages: list[dict[str, Any]], truth: str) -> AnsweredImage | None:
        parts = [part for message in messages for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        conversation = [Message(role=message["role"], content=message["content"]) for message in messages]
        try:
            answer = self.assistant.chat(conversation, images, max_new_tokens=_MAX_ANSWER_TOKENS)
        except InputError:
            return None  # a missing picture must not stop the training
        question = " ".join(part["text"].strip() for part in parts if part["type"] == "text")
        return AnsweredImage(images[0], [(question, f"{answer}   ({truth})")], [])


def has_stopped_early(stage: Stage, checkpoint: str | None) -> bool:
    """Return whether the stage had stopped early at its newest checkpoint, so that only its folder is missing."""
    if checkpoint is None or stage.evaluation is None or stage.evaluation.patience is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    found = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
    return found.get("attributes", {}).get("early_stopping_patience_counter", 0) >= stage.evaluation.patience


def early_stopping_callbacks(evaluation: Evaluation) -> list[TrainerCallback]:
    """Return the callbacks that save the best weights and stop early, if the evaluation has `patience`."""
    if evaluation.patience is None:
        return []
    return [EarlyStoppingCallback(evaluation.patience), BestWeights()]


class AverageWeights(TrainerCallback):
    """The exponential moving average (EMA) of the weights that train, updated after every step.

    A stage with `ema` evaluates and saves these averages.

    Args:
        model: The model that trains.
        decay: Share of the average that is kept at each step. It starts lower, at min(decay, (1 + step) / (10 + step)),
            so that the first weights are soon forgotten (as in TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live: dict[str, Tensor] = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        self.averages = {name: weight.detach().clone() for name, weight in self.live.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        averages, live = list(self.averages.values()), [weight.detach() for weight in self.live.values()]
        get_ema_multi_avg_fn(decay)(averages, live, state.global_step)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the averages."""
        for name, weight in self.live.items():
            held = weight.clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(held)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Use the averages as the model's weights inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights to a safetensors file."""
    with replacing(path) as partial:
        save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, partial)


@torch.no_grad()
def load_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy the file that `save_weights` wrote into weights of the same names and shapes."""
    for name, saved in load_file(path).items():
        weights[name].copy_(saved)
