"""What of a model a stage trains."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor
from convllava.training.lora import attach
from convllava.training.objectives.alignment import Alignment, vocabulary_of
from convllava.training.objectives.auxiliary_heads import attach_heads
from convllava.training.objectives.dense import DensePretraining
from convllava.training.optim import freeze_all_but
from convllava.training.recipe import Stage


def trained_module(
    stage: Stage, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor, before: Path | None = None
) -> nn.Module:
    """What the Trainer trains, frozen where it does not: the model, with heads that begin as those in the folder
    `before` where it learns marks, or parts of it under heads that are thrown away, or adapters beside it."""
    if stage.adapter is not None:
        return attach(model, stage)
    trained: nn.Module = model
    if stage.objective == "dense":
        trained = DensePretraining(model.model.vision_tower)
    elif stage.objective == "align":
        trained = Alignment(model, vocabulary_of(processor.tokenizer))
    elif stage.position_label_weight:
        attach_heads(model, before, letters=stage.character_label_weight > 0)
    freeze_all_but(trained, stage.learning_rates)
    return trained
