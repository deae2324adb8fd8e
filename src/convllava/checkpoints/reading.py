"""Find a checkpoint and read it, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

import convllava.model.auto  # noqa: F401  the Auto classes must know the model
from convllava.checkpoints import adapters, original_reader
from convllava.checkpoints.original_layout import is_official, look_through, on_disk
from convllava.errors import InputError
from convllava.io import is_hub_id, one_line
from convllava.model.builder import Parts
from convllava.model.config import ConvLlavaConfig
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor

SHIPPED = Path(__file__).parents[1] / "weights"
"""Models that come with the package, a folder each."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find(name: str) -> str:
    """A shipped name -> its folder; folders and hub ids pass through.

    Raises:
        InputError: neither a shipped model, nor a folder with a config.json, nor of a hub id's form.
    """
    shipped = sorted(folder.name for folder in SHIPPED.iterdir()) if SHIPPED.exists() else []
    if name in shipped:
        return str(SHIPPED / name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise InputError(f"{name} has no config.json; name the folder of one checkpoint")
        return name
    if not is_hub_id(name):
        known = ", ".join([*shipped, "a folder", "a hub id owner/name"])
        raise InputError(f"there is no model {name!r}; give one of {known}")
    return name


def read(
    path: str | Path, dtype: torch.dtype = torch.float32, base: str | Path | None = None, quantization: Any = None
) -> Parts:
    """A model and its processor from a folder or hub id, in our layout or in that of the published checkpoints; an
    adapter merged into its base.

    Args:
        path: The checkpoint.
        dtype: Of the weights.
        base: What an adapter was trained on, in place of the checkpoint that it names.
        quantization: A quantisation of transformers', for whole checkpoints in our layout.

    Raises:
        InputError: another kind of model, a damaged file, or a tensor that is missing or of another shape.
    """
    path = on_disk(path)
    if quantization is not None and (adapters.is_adapter(path) or is_official(path)):
        raise InputError(
            f"{path} must be a whole checkpoint to be quantised; `convllava merge` or `convert` writes one"
        )
    if adapters.is_adapter(path):
        return _read_adapted(path, dtype, base)
    if is_official(path):
        return original_reader.load(path, dtype)
    with loading(path):
        config = configuration(path)
        loaded: Any = ConvLlavaForConditionalGeneration.from_pretrained(
            path, config=config, dtype=dtype, quantization_config=quantization, output_loading_info=True
        )
        model, report = loaded
        processor = ConvLlavaProcessor.from_pretrained(path)
    if report["missing_keys"]:
        raise InputError(f"{path} lacks the tensor {min(report['missing_keys'])}; its weights are not complete")
    return model, processor


def _read_adapted(path: str | Path, dtype: torch.dtype, base: str | Path | None) -> Parts:
    model, _ = read(find(adapters.base_of(path, base)), adapters.merged_dtype(dtype))
    model = adapters.apply(model, path)
    with loading(path):
        return model.to(dtype), ConvLlavaProcessor.from_pretrained(path)  # type: ignore[arg-type]  # a decorated method


def configuration(path: str | Path) -> ConvLlavaConfig:
    """Of a checkpoint in either layout.

    Raises:
        InputError: it holds another kind of model, or none.
    """
    path = on_disk(path)
    if is_official(path):
        return original_reader.configuration(look_through(path))
    with loading(path):
        config = AutoConfig.from_pretrained(path)
    if not isinstance(config, ConvLlavaConfig):
        raise InputError(f"{path} holds a model of type {config.model_type}, not convllava")
    return config


def processor(path: str | Path) -> ConvLlavaProcessor:
    """Of a checkpoint in either layout, without its model.

    Raises:
        InputError: there is none that loads.
    """
    path = on_disk(path)
    if is_official(path):
        layout = look_through(path)
        return original_reader.processor(layout, original_reader.configuration(layout))
    with loading(path):
        return ConvLlavaProcessor.from_pretrained(path)


@contextmanager
def loading(path: str | Path) -> Iterator[None]:
    """What transformers raises over a folder that is none of ours, as one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"{path} does not load as a ConvLLaVA model: {one_line(error)}") from error
