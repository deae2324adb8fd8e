"""Build the module that a stage trains."""

from pathlib import Path

from torch import nn

from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor
from convllava.training.lora import add_adapter
from convllava.training.objectives.alignment import Alignment, class_tokens
from convllava.training.objectives.auxiliary_heads import attach_heads
from convllava.training.objectives.dense import DensePretraining
from convllava.training.optim import train_only
from convllava.training.recipe import Stage


def build_trained_module(
    stage: Stage, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor, previous: Path | None = None
) -> nn.Module:
    """Return the module that the Trainer trains, with everything else frozen.

    It is the model itself (with auxiliary heads if the stage has position labels), parts of it under heads that are
    discarded later, or the model with an adapter.

    Args:
        stage: The stage to train.
        model: The model; it is changed in place.
        processor: Its tokenizer gives the names of classes.
        previous: The folder of the previous stage. New auxiliary heads start with the weights of its heads.
    """
    if stage.adapter is not None:
        return add_adapter(model, stage)
    trained: nn.Module = model
    if stage.objective == "dense":
        trained = DensePretraining(model.model.vision_tower)
    elif stage.objective == "align":
        trained = Alignment(model, class_tokens(processor.tokenizer))
    elif stage.position_label_weight:
        attach_heads(model, previous, character_labels=stage.character_label_weight > 0)
    train_only(trained, stage.learning_rates)
    return trained
