"""Convert checkpoints between layouts and precisions, and merge adapters into their base."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import GenerationConfig

from convllava.checkpoints import adapters
from convllava.checkpoints.official_layout import is_official, on_disk
from convllava.checkpoints.official_reader import open_official
from convllava.checkpoints.official_writer import write_official
from convllava.checkpoints.reading import DTYPES, configuration, find, loading, read
from convllava.checkpoints.stored_model import StoredModel, shapes_of, without_tied
from convllava.checkpoints.tensors import tensor_files, tensors_in
from convllava.checkpoints.writing import whole_folder, write
from convllava.errors import CheckpointError, ConfigError
from convllava.io import one_line
from convllava.model.config import ConvLlavaConfig
from convllava.model.processing import ConvLlavaProcessor


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: str = "bfloat16",
    *,
    to: str = "convllava",
    base: str | Path | None = None,
) -> str:
    """Write a checkpoint in another layout or precision: official -> ours, ours -> official, or the same layout.

    Args:
        source: A folder, a hub id or the name of a model in the package, in either layout. For a LoRA run of the
            original code: the folder with the adapter.
        destination: A new folder. It appears only when it is complete.
        dtype: float32, bfloat16 or float16.
        to: `convllava`, or `official` for the layout of the original code.
        base: The language model that a LoRA of the original code was trained on, if the path in the LoRA does not exist
            here.

    Returns:
        A remark about the source, such as a second tower that was not used; may be empty.

    Raises:
        CheckpointError: if the source does not load, or the destination cannot be written.
        ConfigError: if the destination exists, or an argument is not known.
    """
    destination = _new_folder(destination, dtype)
    if to not in ("convllava", "official"):
        raise ConfigError(f"`to` {to!r} is not a layout; choose convllava or official")
    source = on_disk(source if Path(source).is_dir() else find(str(source)))
    if adapters.is_adapter(source):
        raise CheckpointError(f"{source} is an adapter; write it and its base as one checkpoint with `convllava merge`")
    if is_official(source):
        stored = open_official(source, DTYPES[dtype], base)
    elif base is None:
        stored = _open(source, DTYPES[dtype])
    else:
        raise ConfigError(f"{source} is a whole checkpoint and not a LoRA; leave `base` out")
    with whole_folder(destination) as folder:
        if to == "convllava":
            stored.save(folder, DTYPES[dtype])
        else:
            write_official(stored, folder)
    return stored.note


def merge(
    adapter: str | Path, destination: str | Path, dtype: str = "bfloat16", base: str | Path | None = None
) -> None:
    """Write an adapter and its base as one plain checkpoint.

    Args:
        adapter: Folder that a stage with `adapter` has written.
        destination: A new folder. It appears only when it is complete.
        dtype: float32, bfloat16 or float16.
        base: The checkpoint that the adapter was trained on, instead of the one that the adapter names.

    Raises:
        CheckpointError: if it is not an adapter, or its base does not exist here.
        ConfigError: if the destination exists, or `dtype` is not known.
    """
    destination = _new_folder(destination, dtype)
    adapter = find(str(adapter))
    if not adapters.is_adapter(adapter):
        raise CheckpointError(f"{adapter} is not an adapter's folder; `convllava convert` converts whole checkpoints")
    model, processor = read(adapter, DTYPES[dtype], base)
    write(model, processor, destination)


def _new_folder(destination: str | Path, dtype: str) -> Path:
    """Return the destination; check the arguments that all commands here share."""
    if dtype not in DTYPES:
        raise ConfigError(f"`dtype` {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    if Path(destination).exists():
        raise ConfigError(f"{destination} exists already; choose another folder or remove it")
    return Path(destination)


def _open(source: str | Path, dtype: torch.dtype) -> StoredModel:
    """Open a checkpoint in our layout. Its tensors are read when they are requested."""
    try:
        folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(f"{source} does not load: {one_line(error)}") from None
    with loading(folder):
        config = configuration(folder)
        processor = ConvLlavaProcessor.from_pretrained(folder)
        has_generation = (folder / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(folder) if has_generation else GenerationConfig()
    return StoredModel(config, processor, generation, partial(_tensors, folder, config, dtype), folder)


def _tensors(
    folder: Path, config: ConvLlavaConfig, dtype: torch.dtype, prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors whose names begin with a prefix, file after file."""
    expected = shapes_of(config)
    for path in tensor_files(folder):
        found = tensors_in(path)
        for name in found:
            tensor = found[name]
            if expected.pop(name, None) != tensor.shape:
                raise CheckpointError(
                    f"{path}: {name} has the shape {list(tensor.shape)}, which the model does not have"
                )
            if name.startswith(prefix):
                yield name, tensor.to(dtype)
    if missing := without_tied(expected, config):
        raise CheckpointError(f"{folder} lacks the tensor {min(missing)}; its weights are not complete")
