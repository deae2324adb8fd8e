"""Find a checkpoint and read it, in any layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

import convllava.model.auto  # noqa: F401  the Auto classes must know the model
from convllava.checkpoints import adapters, official_reader
from convllava.checkpoints.official_layout import find_parts, is_official, on_disk
from convllava.errors import CheckpointError, InputError
from convllava.io import is_hub_id, one_line
from convllava.model.builder import Parts
from convllava.model.config import ConvLlavaConfig
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor

SHIPPED = Path(__file__).parents[1] / "weights"
"""Models in the package, a folder each."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find(name: str) -> str:
    """Return the folder of a model in the package; folders and hub ids are returned as they are.

    Raises:
        CheckpointError: if `name` is neither a model in the package, nor a folder with a config.json, nor a hub id.
    """
    shipped = sorted(folder.name for folder in SHIPPED.iterdir()) if SHIPPED.exists() else []
    if name in shipped:
        return str(SHIPPED / name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise CheckpointError(f"{name} has no config.json; give the folder of one checkpoint")
        return name
    if not is_hub_id(name):
        known = ", ".join([*shipped, "a folder", "a hub id owner/name"])
        raise CheckpointError(f"there is no model {name!r}; give one of {known}")
    return name


def read(
    path: str | Path, dtype: torch.dtype = torch.float32, base: str | Path | None = None, quantization: Any = None
) -> Parts:
    """Read a model and its processor from a folder or hub id, in our layout or the official one. An adapter is merged
    into its base.

    Args:
        path: The checkpoint.
        dtype: Precision of the weights.
        base: The checkpoint that an adapter was trained on, instead of the one that the adapter names.
        quantization: A quantisation config of transformers, for whole checkpoints in our layout.

    Raises:
        CheckpointError: if it is another kind of model, a file is damaged, or a tensor is missing or has a wrong shape.
    """
    path = on_disk(path)
    if quantization is not None and (adapters.is_adapter(path) or is_official(path)):
        raise CheckpointError(
            f"{path} cannot be quantised, because it is an adapter or in the official layout; use `convllava merge` "
            "or `convllava convert`"
        )
    if adapters.is_adapter(path):
        # Half precision would round the small changes of the adapter away.
        merging = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        model = adapters.apply(read(find(adapters.base_of(path, base)), merging)[0], path)
        with loading(path):
            return model.to(dtype), ConvLlavaProcessor.from_pretrained(path)  # type: ignore[arg-type]  # a decorated method
    if is_official(path):
        return official_reader.load(path, dtype)
    with loading(path):
        config = configuration(path)
        loaded: Any = ConvLlavaForConditionalGeneration.from_pretrained(
            path, config=config, dtype=dtype, quantization_config=quantization, output_loading_info=True
        )
        model, report = loaded
        processor = ConvLlavaProcessor.from_pretrained(path)
    if report["missing_keys"]:
        raise CheckpointError(f"{path} lacks the tensor {min(report['missing_keys'])}; its weights are not complete")
    return model, processor


def configuration(path: str | Path) -> ConvLlavaConfig:
    """Read the configuration of a checkpoint in any layout.

    Raises:
        CheckpointError: if there is no model, or another kind of model.
    """
    path = on_disk(path)
    if is_official(path):
        return official_reader.configuration(find_parts(path))
    with loading(path):
        config = AutoConfig.from_pretrained(path)
    if not isinstance(config, ConvLlavaConfig):
        raise CheckpointError(f"{path} holds a model of type {config.model_type}, not convllava")
    return config


def processor(path: str | Path) -> ConvLlavaProcessor:
    """Read the processor of a checkpoint in any layout, without its weights.

    Raises:
        CheckpointError: if no processor can be loaded.
    """
    path = on_disk(path)
    if is_official(path):
        layout = find_parts(path)
        return official_reader.processor(layout, official_reader.configuration(layout))
    with loading(path):
        return ConvLlavaProcessor.from_pretrained(path)


@contextmanager
def loading(path: str | Path) -> Iterator[None]:
    """Turn the errors that transformers raises for a folder without a ConvLLaVA model into one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} does not load as a ConvLLaVA model: {one_line(error)}") from error
