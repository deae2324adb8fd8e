"""Models on disk: reading one in any layout, converting it, writing a folder that is either whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

import convllava.auto  # noqa: F401  the Auto classes must know the model
from convllava import official
from convllava.building import Parts
from convllava.configuration import ConvLlavaConfig
from convllava.errors import InputError
from convllava.modeling import ConvLlavaForConditionalGeneration
from convllava.processing import ConvLlavaProcessor


def read(path: str | Path, dtype: torch.dtype = torch.float32) -> Parts:
    """A model and its processor from a folder or hub id, in our layout or in that of the published checkpoints.

    Raises:
        InputError: another kind of model, a damaged file, or a tensor that is missing or of another shape.
    """
    path = official.on_disk(path)
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
    source, destination = official.on_disk(source), Path(destination)
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
            official.write_official(model, processor, folder, Path(source))
    return ""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`; renamed to it when the block ends well, removed when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
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
