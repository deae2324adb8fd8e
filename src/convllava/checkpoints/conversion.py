"""Convert checkpoints between layouts and precisions, and merge adapters into their base."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import GenerationConfig

from convllava.checkpoints import adapters, original_reader
from convllava.checkpoints.original_layout import is_official, on_disk
from convllava.checkpoints.original_writer import write_official
from convllava.checkpoints.reading import DTYPES, configuration, find, loading, read
from convllava.checkpoints.stored_model import StoredModel, shapes_of, without_tied
from convllava.checkpoints.tensors import tensor_files, tensors_in
from convllava.checkpoints.writing import whole_folder, write
from convllava.errors import InputError
from convllava.io import one_line
from convllava.model.config import ConvLlavaConfig
from convllava.model.processing import ConvLlavaProcessor


def merge(adapter: str | Path, destination: str | Path, dtype: str = "bfloat16", base: str | None = None) -> None:
    """Write an adapter and its base as one plain checkpoint.

    Args:
        adapter: The folder of what a stage with `adapter` has written.
        destination: A new folder, which appears only when it is complete.
        dtype: float32, bfloat16 or float16.
        base: What it was trained on, in place of the checkpoint that it names.

    Raises:
        InputError: it is no adapter, its base is not here, or the destination exists.
    """
    destination = Path(destination)
    _check_new(destination, dtype)
    adapter = find(str(adapter))
    if not adapters.is_adapter(adapter):
        raise InputError(f"{adapter} is no folder of an adapter; `convllava convert` writes a whole checkpoint again")
    model, processor = read(adapter, DTYPES[dtype], base)
    write(model, processor, destination)


def _check_new(destination: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if destination.exists():
        raise InputError(f"{destination} exists already; choose another folder or remove it")


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
    _check_new(destination, dtype)
    if to not in ("convllava", "official"):
        raise InputError(f"there is no layout {to!r}; choose convllava or official")
    if adapters.is_adapter(source):
        raise InputError(f"{source} is an adapter; write it with its base as one checkpoint by `convllava merge`")
    if is_official(source):
        found = original_reader.look_up(source, DTYPES[dtype], base)
    elif base is None:
        found = look_up(source, DTYPES[dtype])
    else:
        raise InputError(f"{source} is a whole checkpoint and no LoRA; leave --base out")
    with whole_folder(destination) as folder:
        if to == "convllava":
            found.save(folder, DTYPES[dtype])
        else:
            write_official(found, folder)
    return found.note


def look_up(source: str | Path, dtype: torch.dtype) -> StoredModel:
    """A checkpoint in our layout whose tensors are read as they are asked for.

    Raises:
        InputError: as `read`; of tensors when they are asked for.
    """
    try:
        folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{source} does not load: {one_line(error)}") from None
    with loading(folder):
        config = configuration(folder)
        processor = ConvLlavaProcessor.from_pretrained(folder)
        has_generation = (folder / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(folder) if has_generation else GenerationConfig()
    return StoredModel(config, processor, generation, partial(_tensors, folder, config, dtype), folder)


def _tensors(
    folder: Path, config: ConvLlavaConfig, dtype: torch.dtype, prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of our layout, one file after the other, those that begin with a prefix."""
    expected = shapes_of(config)
    for path in tensor_files(folder):
        found = tensors_in(path)
        for name in found:
            tensor = found[name]
            if expected.pop(name, None) != tensor.shape:
                raise InputError(f"{path}: {name} has the shape {list(tensor.shape)}, which the model does not have")
            if name.startswith(prefix):
                yield name, tensor.to(dtype)
    if missing := without_tied(expected, config):
        raise InputError(f"{folder} lacks the tensor {min(missing)}; its weights are not complete")
