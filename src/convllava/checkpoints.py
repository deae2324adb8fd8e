"""Models on disk and from nothing: building a fresh one, writing a folder that is either whole or absent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

import convllava.auto  # noqa: F401  the Auto classes must know the model
from convllava import official
from convllava.configuration import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.errors import InputError
from convllava.image_processing import ConvLlavaImageProcessorPil
from convllava.modeling import ConvLlavaForConditionalGeneration
from convllava.processing import ConvLlavaProcessor
from convllava.tokenization import END, PAD, build_tokenizer

Parts = tuple[ConvLlavaForConditionalGeneration, ConvLlavaProcessor]
OFFICIAL_OWNER = re.compile(r"ConvLLaVA/[\w.-]+$")
"""Hub ids whose repositories are in the published layout."""


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
    """A model with random weights and a processor with a spelling tokenizer, ready for the first stage.

    Args:
        vision: Settings of `ConvLlavaVisionConfig`.
        language: Settings of a causal language model; `model_type` names its family. The vocabulary is filled in.
        pixels: Settings of `ConvLlavaImageProcessorPil`; the stride is filled in.
        words: What the tokenizer knows as single tokens (see `tokenization.build_tokenizer`).
        seed: Of the weights.
    """
    tower = ConvLlavaVisionConfig(**vision)
    tokenizer = build_tokenizer(words, context=language.get("max_position_embeddings", 2048))
    processor = ConvLlavaProcessor(
        ConvLlavaImageProcessorPil(**{**pixels, "stride": tower.stride}), tokenizer, row_separator=row_separator
    )
    ids = {"pad_token_id": tokenizer.convert_tokens_to_ids(PAD), "eos_token_id": tokenizer.convert_tokens_to_ids(END)}
    config = ConvLlavaConfig(
        vision_config=tower,
        text_config={**language, "vocab_size": len(tokenizer), "bos_token_id": None, **ids},
        image_token_id=processor.image_token_id,
        row_separator=row_separator,
        coordinate_embedding=coordinate_embedding,
    )
    torch.manual_seed(seed)
    model = ConvLlavaForConditionalGeneration(config)
    initialise_from_nothing(model.model.vision_tower)
    initialise_attention(model.model.language_model)
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
    return model, processor


def read(path: str | Path, dtype: torch.dtype = torch.float32) -> Parts:
    """A model and its processor from a folder or hub id, in our layout or in that of the published checkpoints.

    Raises:
        InputError: another kind of model, a damaged file, or a tensor that is missing or of another shape.
    """
    path = on_disk(path)
    if official.is_official(path):
        return official.load(path, dtype)
    try:
        config = AutoConfig.from_pretrained(path)
        if not isinstance(config, ConvLlavaConfig):
            raise InputError(f"{path} holds a model of type {config.model_type}, not convllava")
        loaded: Any = ConvLlavaForConditionalGeneration.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True
        )
        model, report = loaded
        processor = ConvLlavaProcessor.from_pretrained(path)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} does not load as a ConvLLaVA model: {lines[0]}") from error
    if report["missing_keys"]:
        raise InputError(f"{path} lacks the tensor {min(report['missing_keys'])}; its weights are not complete")
    return model, processor


def write(model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor, path: Path, **texts: str) -> None:
    """Save both, and texts as NAME.yaml; the folder appears only when it is complete and replaces an older one."""
    with whole_folder(path) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for name, text in texts.items():
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def on_disk(path: str | Path) -> str | Path:
    """The folder of a published checkpoint that goes by a hub id, fetched if need be; anything else passes through."""
    if Path(path).exists() or not OFFICIAL_OWNER.match(str(path)):
        return path
    try:
        return snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*/*"])
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{path} cannot be fetched: {str(error).strip().splitlines()[0]}") from None


def initialise_from_nothing(tower: nn.Module) -> None:
    """LeCun-normal weights (standard deviation 1/sqrt(fan-in)).

    The 0.02 of ConvNeXt suits its hundreds of channels; in a tower of tens the blocks would hardly act at first.
    """
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)


@torch.no_grad()
def initialise_attention(language_model: nn.Module) -> None:
    """Let attention begin by matching and copying: keys equal queries, and what is read is written back as it was.

    A question's "square" then looks at what holds something square from the first step on, where a small model
    otherwise needs thousands of steps to find that out. In the manner of mimetic initialisation (arXiv 2305.09828),
    which gives random weights the correlations of trained ones. Only where keys have as many heads as queries.
    """
    for module in language_model.modules():
        projections = [getattr(module, f"{name}_proj", None) for name in "qkvo"]
        weights = [projection.weight for projection in projections if isinstance(projection, nn.Linear)]
        if len(weights) == 4:
            query, key, value, output = weights
            if key.shape == query.shape:
                key.copy_(query)
                output.copy_(value.T)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: str = "bfloat16",
    *,
    to: str = "convllava",
    base: str | Path | None = None,
) -> str:
    """Write a checkpoint again: a published one in our layout, ours in the published one, either in another precision.

    Args:
        source: A folder or hub id in either layout; of the original's LoRA runs the folder with the adapter.
        destination: A new folder, which appears only when it is complete.
        dtype: float32, bfloat16 or float16.
        to: `convllava`, or `official` for the layout of the original code.
        base: What a LoRA was trained on, where its own folder names a path that is not here.

    Returns:
        What a user should know of the source; empty if nothing.

    Raises:
        InputError: the source does not load, the destination exists, or a setting is unknown.
    """
    source, destination = on_disk(source), Path(destination)
    if dtype not in DTYPES:
        raise InputError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if to not in ("convllava", "official"):
        raise InputError(f"there is no layout {to!r}; choose convllava or official")
    if destination.exists():
        raise InputError(f"{destination} exists already; choose another folder or remove it")
    if to == "convllava" and official.is_official(source):
        with whole_folder(destination) as folder:
            return official.convert(source, folder, DTYPES[dtype], base)
    model, processor = read(source, DTYPES[dtype])
    if to == "convllava":
        write(model, processor, destination)
    else:
        with whole_folder(destination) as folder:
            official.write_official(model, processor, folder)
    return ""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`; renamed to it when the block ends well, removed when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    older = path.with_name(f".{path.name}.older")
    if path.exists():
        path.rename(older)
    partial.rename(path)
    shutil.rmtree(older, ignore_errors=True)
