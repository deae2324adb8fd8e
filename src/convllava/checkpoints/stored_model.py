"""A checkpoint on disk whose tensors are read only when they are requested."""

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


class TensorReader(Protocol):
    """Yields (name, tensor) for the tensors whose names begin with a prefix; without a prefix, for all."""

    def __call__(self, prefix: str = "", /) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class StoredModel:
    """One checkpoint in any layout.

    Attributes:
        config, processor, generation: In our form.
        tensors: Reads the tensors under our names, each once; may raise CheckpointError.
        tokenizer_folder: Folder with the tokenizer.
        note: A remark for the user about the checkpoint; may be empty.
    """

    config: ConvLlavaConfig
    processor: ConvLlavaProcessor
    generation: GenerationConfig
    tensors: TensorReader
    tokenizer_folder: Path
    note: str = ""

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write it in our layout into an empty folder; `dtype` is the precision of the tensors."""
        self.processor.save_pretrained(folder)
        self.copy_vocabulary(folder)
        write_tensors(self.tensors(), folder)
        self.config.architectures = [ConvLlavaForConditionalGeneration.__name__]
        self.config.dtype = dtype
        self.config.save_pretrained(folder)
        self.generation.save_pretrained(folder)

    def copy_vocabulary(self, folder: Path) -> None:
        """Copy the tokenizer.model that the original's slow tokenizer reads, if there is one."""
        if (self.tokenizer_folder / VOCABULARY).is_file():
            shutil.copyfile(self.tokenizer_folder / VOCABULARY, folder / VOCABULARY)


def without_tied(names: Iterable[str], config: ConvLlavaConfig) -> set[str]:
    """Return the names that a file must contain: tied embeddings are stored once."""
    tied = {"lm_head.weight"} if config.text_config.tie_word_embeddings else set()
    return set(names) - tied


def shapes_of(config: ConvLlavaConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a model, without allocating it."""
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
