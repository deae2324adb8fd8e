"""A running average of the weights (EMA), which is what a stage with `ema` evaluates and leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from convllava.io import replacing

_FILE = "average.safetensors"


class Average(TrainerCallback):
    """The exponential moving average of the parameters that train, updated after every step.

    Args:
        model: Whose parameters.
        decay: How much of the average stays at each step. It begins lower, as min(decay, (1 + step) / (10 + step)), so
            that the first weights are soon forgotten (as TensorFlow's ExponentialMovingAverage with num_updates does).
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
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averages for weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def save(self, folder: Path) -> None:
        """Beside the other files of a checkpoint."""
        save_weights(self.averages, folder / _FILE)

    def load(self, folder: Path) -> None:
        """From a checkpoint's folder."""
        load_weights(self.averages, folder / _FILE)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights to a safetensors file."""
    with replacing(path) as partial:
        save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, partial)


@torch.no_grad()
def load_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Read what `save_weights` wrote into weights of the same names and shapes."""
    for name, saved in load_file(path).items():
        weights[name].copy_(saved)
