"""A checkpoint on disk, of which tensors are read only as they are asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from convllava.checkpoints.tensors import VOCABULARY, write_tensors
from convllava.model.config import ConvLlavaConfig
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor


class Tensors(Protocol):
    """Tensors by name."""

    def __call__(self, prefix: str = "", /) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class StoredModel:
    """One checkpoint, in whichever layout it lies.

    Attributes:
        config, processor, generation: As we write them.
        tensors: Called with a prefix of our names (none: all), gives those tensors by name, each once; reading may
            raise `InputError`.
        tokenizer_folder: Where its tokenizer lies.
        note: What a user should know of it; empty if nothing.
    """

    config: ConvLlavaConfig
    processor: ConvLlavaProcessor
    generation: GenerationConfig
    tensors: Tensors
    tokenizer_folder: Path
    note: str = ""

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write it in our layout into an empty folder."""
        self.processor.save_pretrained(folder)
        self.copy_vocabulary(folder)
        write_tensors(self.tensors(), folder)
        self.config.architectures = [ConvLlavaForConditionalGeneration.__name__]
        self.config.dtype = dtype
        self.config.save_pretrained(folder)
        self.generation.save_pretrained(folder)

    def copy_vocabulary(self, folder: Path) -> None:
        """Keep the tokenizer in the form that the original's slow tokenizer reads."""
        if (self.tokenizer_folder / VOCABULARY).is_file():
            shutil.copyfile(self.tokenizer_folder / VOCABULARY, folder / VOCABULARY)


def without_tied(names: Iterable[str], config: ConvLlavaConfig) -> set[str]:
    """Those of a model's tensors that a file must have: tied embeddings are both in one of them."""
    tied = {"lm_head.weight"} if config.text_config.tie_word_embeddings else set()
    return set(names) - tied


def shapes_of(config: ConvLlavaConfig) -> dict[str, torch.Size]:
    """Every tensor of a model and its shape, without allocating it."""
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
