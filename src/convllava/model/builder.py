"""Fresh models: random weights, a tokenizer that spells, and the initialisations that small models need."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

import convllava.model.auto  # noqa: F401  the Auto classes must know the model
from convllava.errors import ConfigError, InputError
from convllava.io import one_line
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor
from convllava.model.tokenizer import COORDINATES, END, PAD, build_tokenizer

Parts = tuple[ConvLlavaForConditionalGeneration, ConvLlavaProcessor]
_SIMILAR_DISTANCE = 0.06
"""Distance in the image, as a fraction of its side, up to which the tokens of two coordinates start similar."""


def build_fresh(
    *,
    vision: dict[str, Any],
    language: dict[str, Any],
    pixels: dict[str, Any],
    words: Iterable[str],
    row_separator: bool = True,
    coordinate_embedding: bool = True,
    seed: int = 0,
) -> Parts:
    """Build a model with random weights and a processor with a spelling tokenizer, ready for the first stage.

    Args:
        vision: Settings of `ConvLlavaVisionConfig`.
        language: Settings of a causal language model; `model_type` names its family. The vocabulary is filled in.
        pixels: Settings of `ConvLlavaImageProcessorPil`; the stride is filled in.
        words: Words that the tokenizer knows as single tokens (see `tokenizer.build_tokenizer`).
        row_separator, coordinate_embedding: See `ConvLlavaConfig`.
        seed: Seed of the weights.

    Raises:
        ConfigError: if no model can have these settings.
    """
    with _settings_errors():
        tower = ConvLlavaVisionConfig(**vision)
        tokenizer = build_tokenizer(words, context=language.get("max_position_embeddings", 2048))
        processor = ConvLlavaProcessor(
            ConvLlavaImageProcessorPil(**{**pixels, "stride": tower.stride}), tokenizer, row_separator=row_separator
        )
        ids = {
            "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
            "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        }
        config = ConvLlavaConfig(
            vision_config=tower,
            text_config={**language, "vocab_size": len(tokenizer), "bos_token_id": None, **ids},
            image_token_id=processor.image_token_id,
            row_separator=row_separator,
            coordinate_embedding=coordinate_embedding,
        )
        torch.manual_seed(seed)
        model = ConvLlavaForConditionalGeneration(config)
    initialise_tower(model.model.vision_tower)
    initialise_attention(model.model.language_model)
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in dict.fromkeys(table.weight for table in tables):  # tied tables share one weight
        initialise_coordinates(weight, [tokenizer.get_vocab()[text] for text in COORDINATES])
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
    return model, processor


@contextmanager
def _settings_errors() -> Iterator[None]:
    """Turn the errors that transformers and torch raise for bad settings into one line."""
    try:
        yield
    except InputError:
        raise
    except (
        AttributeError,  # torch has no dtype of this name
        ValueError,
        TypeError,
        KeyError,
        ZeroDivisionError,
        RuntimeError,
        StrictDataclassError,
    ) as error:
        reason = repr(error) if isinstance(error, KeyError) else one_line(error)
        raise ConfigError(
            f"model: no model can have these settings of vision, language and pixels: {reason}"
        ) from error


@torch.no_grad()
def initialise_coordinates(weight: Tensor, ids: Sequence[int]) -> None:
    """Place the embeddings of the coordinate tokens on a smooth curve, so that 0.37 starts close to 0.38.

    With independent random rows a box that is nearly right would be as wrong as any other, and each number would have
    to be learnt alone. The inner product of two rows falls with their distance like a Gaussian: random Fourier features
    (Rahimi and Recht, 2007).

    Args:
        weight: (tokens, width), an embedding table; the rows of `ids` are overwritten.
        ids: Tokens of the coordinates in rising order.
    """
    values = torch.linspace(0, 1, len(ids), device=weight.device)[:, None]
    frequencies, phases = torch.randn(weight.shape[1]) / _SIMILAR_DISTANCE, torch.rand(weight.shape[1]) * 2 * torch.pi
    features = (values * frequencies.to(weight.device) + phases.to(weight.device)).cos() * 2**0.5
    weight[list(ids)] = (features * weight.std()).to(weight.dtype)


@torch.no_grad()
def initialise_tower(tower: nn.Module) -> None:
    """Draw LeCun-normal weights (standard deviation 1/sqrt(fan-in)).

    ConvNeXt's 0.02 suits its hundreds of channels. In a tower with tens of channels the blocks would have almost no
    effect at first.
    """
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)


@torch.no_grad()
def initialise_attention(language_model: nn.Module) -> None:
    """Let attention start by matching and copying: keys equal queries, the output is the transposed value projection.

    The "square" of a question then attends to tokens that contain a square from the first step. A small model
    otherwise needs thousands of steps to find this. It follows mimetic initialisation (arXiv 2305.09828), which gives
    random weights the correlations of trained ones. Layers with fewer key heads than query heads stay as they are.
    """
    for module in language_model.modules():
        projections = [getattr(module, f"{name}_proj", None) for name in "qkvo"]
        weights = [projection.weight for projection in projections if isinstance(projection, nn.Linear)]
        if len(weights) == 4:
            query, key, value, output = weights
            if key.shape == query.shape:
                key.copy_(query)
                output.copy_(value.T)
