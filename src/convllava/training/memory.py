"""Memory of training: weights, gradients and optimiser state of every part, and the activations of a micro-batch.

Formulas give the size of the activations that autograd keeps, for the tower's training path and for a Llama-like
language model with fused attention. A test compares them with the memory that autograd really keeps.
"""

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
    """Memory of one process in GB.

    Attributes:
        weights: All weights in float32; a language model in four bits needs less.
        gradients: Gradients of the parameters that train.
        optimizer: AdamW's two moments; Muon needs less, one for most matrices.
        tower: Activations of the vision tower.
        language_model: Activations of the language model.
        logits: Logits with their gradients, in float32.
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
    """Return the memory of one process in one micro-batch.

    Args:
        parameters: Number of parameters of the whole model.
        trained: Number of parameters that train, including adapters.
        config: Configuration of the model.
        stage: The stage that trains.
        pixels: Pixels of all images of the micro-batch.
        tokens: Positions of all sequences of the micro-batch, with visual tokens and padding.
        processes: Processes that share weights, gradients and optimiser state, as under FSDP.
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
    return {name: round(count / GB, 2) for name, count in found.items()}  # type: ignore[return-value]  # all keys exist


def tower_activations(config: ConvLlavaVisionConfig, stage: Stage, pixels: int) -> int:
    """Return the bytes that autograd keeps of the vision tower, from the first stage that trains.

    A block of C channels keeps 12 C values per pixel: its input, the results of convolution, norm and second linear
    layer, and 4 C on both sides of the GELU. Between stages, patches and norms are 4 C more. With gradient
    checkpointing a block keeps only its input, and one block at a time keeps everything.
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
    return _bytes_per_value(stage) * (kept + (largest if stage.gradient_checkpointing else 0))


def language_activations(text: Any, stage: Stage, tokens: int) -> int:
    """Return the bytes that autograd keeps of the language model. Gradients pass through it in every chat stage.

    A layer of width h with an MLP of width m and keys of width k keeps 8 h + 2 k + 4 m values per token.
    """
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    keys = head * (getattr(text, "num_key_value_heads", None) or heads)
    layer = 8 * width + 2 * keys + 4 * text.intermediate_size
    layers = text.num_hidden_layers
    kept = layers * width + layer if stage.gradient_checkpointing else layers * layer
    return _bytes_per_value(stage) * tokens * (kept + 2 * width)


def _bytes_per_value(stage: Stage) -> int:
    return 2 if stage.precision == "bfloat16" else 4


@contextmanager
def explaining_out_of_memory(
    recipe: Recipe, stage: Stage, model: nn.Module, config: Any, batch: Mapping[str, Any]
) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a message that names the users of memory and the settings that
    reduce it.

    Raises:
        InputError: if memory runs out.
    """
    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not _OUT_OF_MEMORY.search(str(error)):
            raise
        cause = error
    weights = [weight for named in parts_of(model).values() for _, weight in named]
    parameters = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    images = batch.get("pixel_values", ())
    pixels = sum(image.shape[-2] * image.shape[-1] for image in images)
    tokens = batch["input_ids"].numel() if "input_ids" in batch else 0
    sharing = 1 if recipe.sharding == "none" else process_count()
    found = memory_of(parameters, trained, config, stage, pixels, tokens, sharing)
    sizes = ", ".join(f"{name.replace('_', ' ')} {size:g}" for name, size in found.items())
    raise InputError(
        f"out of memory in stage {stage.name}, in a micro-batch of {len(images)} images with {pixels / 1e6:.1f} million"
        f" pixels and {tokens} tokens; it needs about, in GB: {sizes}; less with {', '.join(_remedies(recipe, stage))}"
    ) from cause


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
