"""What training holds in memory: weights, gradients and the optimiser of every part, and the activations of a batch.

Activations are counted in closed form, from what autograd keeps of the tower's training path and of a Llama-like
language model with fused attention; a test holds them against what it really keeps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import nn

from convllava.errors import InputError
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.part_names import parts_of
from convllava.training.distributed import process_count
from convllava.training.recipe import Recipe, Stage

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|bad_alloc", re.IGNORECASE)
GB = 1e9


class Memory(TypedDict):
    """In GB, for one process.

    Attributes:
        weights: All of them in float32; a language model in four bits holds less.
        gradients: Of those that train.
        optimizer: AdamW's two moments; Muon holds less, one for most matrices.
        tower: Activations of the vision tower.
        language_model: Activations of the language model.
        logits: With their gradients, in float32.
    """

    weights: float
    gradients: float
    optimizer: float
    tower: float
    language_model: float
    logits: float


def memory_of(
    parameters: int, trained: int, config: ConvLlavaConfig, stage: Stage, pixels: int, tokens: int, processes: int = 1
) -> Memory:
    """Of one process in one pass.

    Args:
        parameters: Of the whole model.
        trained: Parameters that train, those of adapters among them.
        pixels: Of all images of the pass.
        tokens: Positions of all sequences of the pass, visual ones and padding included.
        processes: That share weights, gradients and the optimiser's state, as under FSDP.
    """
    states = {"weights": 4 * parameters, "gradients": 4 * trained, "optimizer": 8 * trained}
    activations = {
        "tower": tower_activations(config.vision_config, stage, pixels),
        "language_model": language_activations(config.text_config, stage, tokens),
        "logits": 3 * 4 * tokens * config.text_config.vocab_size,
    }
    if stage.objective != "chat":  # the language model does not run
        activations |= {"language_model": 0, "logits": 0}
    found = {name: count / processes for name, count in states.items()} | activations
    return {name: round(count / GB, 2) for name, count in found.items()}  # type: ignore[return-value]  # all keys are there


def tower_activations(config: ConvLlavaVisionConfig, stage: Stage, pixels: int) -> int:
    """Bytes that autograd keeps of the vision tower, from its first stage that trains on.

    A block of C channels keeps 12 C values a pixel: its input, the results of convolution, norm and second linear
    layer, and twice 4 C around the GELU; between stages, patches and norms are 4 C more. With gradient checkpointing a
    block keeps its input alone, and one block at a time all.
    """
    kept, largest = 0, 0
    first = min((int(part[5:]) for part in stage.learning_rates if part.startswith("stage")), default=None)
    first = 1 if "stem" in stage.learning_rates else first
    if first is None:
        return 0
    for number, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes, strict=True)):
        area = pixels // (config.patch_size * 2**number) ** 2
        if number + 1 < first:
            continue
        block = 12 * area * width
        largest = max(largest, block)
        kept += 4 * area * width + depth * (area * width if stage.gradient_checkpointing else block)
    return _bytes(stage) * (kept + (largest if stage.gradient_checkpointing else 0))


def language_activations(text: Any, stage: Stage, tokens: int) -> int:
    """Bytes that autograd keeps of the language model, through which gradients go in any stage.

    A layer of width h with an MLP of width m and k wide keys keeps 8 h + 2 k + 4 m values a token.
    """
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    keys = head * (getattr(text, "num_key_value_heads", None) or heads)
    layer = 8 * width + 2 * keys + 4 * text.intermediate_size
    layers = text.num_hidden_layers
    kept = layers * width + layer if stage.gradient_checkpointing else layers * layer
    return _bytes(stage) * tokens * (kept + 2 * width)


def _bytes(stage: Stage) -> int:
    return 2 if stage.precision == "bfloat16" else 4


@contextmanager
def explaining(recipe: Recipe, stage: Stage, model: nn.Module, config: Any, batch: Mapping[str, Any]) -> Iterator[None]:
    """Where memory runs out within, say what took it and which settings take less.

    Raises:
        InputError: it has.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise InputError(explanation(recipe, stage, model, config, batch)) from error


def explanation(recipe: Recipe, stage: Stage, model: nn.Module, config: Any, batch: Mapping[str, Any]) -> str:
    """One line: what a pass holds, and by which keys of the recipe it holds less."""
    weights = [weight for named in parts_of(model).values() for _, weight in named]
    parameters = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    images = batch.get("pixel_values", ())
    pixels = sum(image.shape[-2] * image.shape[-1] for image in images)
    tokens = batch["input_ids"].numel() if "input_ids" in batch else 0
    found = memory_of(parameters, trained, config, stage, pixels, tokens, _sharing(recipe))
    told = ", ".join(f"{name.replace('_', ' ')} {size:g}" for name, size in found.items())
    return (
        f"out of memory in stage {stage.name}, in a pass of {len(images)} images with {pixels / 1e6:.1f} million "
        f"pixels and {tokens} tokens; it holds about, in GB: {told}; less with {', '.join(_remedies(recipe, stage))}"
    )


def _sharing(recipe: Recipe) -> int:
    return 1 if recipe.sharding == "none" else process_count()


def _remedies(recipe: Recipe, stage: Stage) -> Iterator[str]:
    if stage.budget is not None:
        yield "a smaller budget"
    elif stage.batch_size > stage.gradient_accumulation_steps:
        more = 2 * stage.gradient_accumulation_steps
        yield f"gradient_accumulation_steps: {more} (the same steps in smaller micro-batches)"
    if not stage.gradient_checkpointing and stage.objective == "chat":
        yield "gradient_checkpointing: true"
    if stage.precision == "float32":
        yield "precision: bfloat16"
    yield "pixels: {max_pixels: fewer}"
    if stage.data.sources:
        yield "data.max_tokens"
    if stage.adapter is None and "language_model" in stage.learning_rates and stage.objective == "chat":
        yield "adapter (LoRA)"
    if recipe.sharding == "none" and stage.objective == "chat":
        yield "sharding: fsdp over more processes"
