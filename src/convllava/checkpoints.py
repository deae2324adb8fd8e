"""Models on disk: reading one in any layout, converting it, writing a folder that is either whole or absent."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

import convllava.auto  # noqa: F401  the Auto classes must know the model
from convllava import adapters, official
from convllava.building import Parts
from convllava.configuration import ConvLlavaConfig
from convllava.errors import InputError
from convllava.files import is_hub_id, one_line, tensor_files, tensors_in
from convllava.modeling import ConvLlavaForConditionalGeneration
from convllava.processing import ConvLlavaProcessor
from convllava.stored import StoredModel, shapes_of, without_tied

SHIPPED = Path(__file__).parent / "weights"
"""Models that come with the package, a folder each."""


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
    path = official.on_disk(path)
    if quantization is not None and (adapters.is_adapter(path) or official.is_official(path)):
        raise InputError(
            f"{path} must be a whole checkpoint to be quantised; `convllava merge` or `convert` writes one"
        )
    if adapters.is_adapter(path):
        return _read_adapted(path, dtype, base)
    if official.is_official(path):
        return official.load(path, dtype)
    with _loading(path):
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
    with _loading(path):
        return model.to(dtype), ConvLlavaProcessor.from_pretrained(path)  # type: ignore[arg-type]  # a decorated method


def configuration(path: str | Path) -> ConvLlavaConfig:
    """Of a checkpoint in either layout.

    Raises:
        InputError: it holds another kind of model, or none.
    """
    path = official.on_disk(path)
    if official.is_official(path):
        return official.configuration(official.look_through(path))
    with _loading(path):
        config = AutoConfig.from_pretrained(path)
    if not isinstance(config, ConvLlavaConfig):
        raise InputError(f"{path} holds a model of type {config.model_type}, not convllava")
    return config


def processor(path: str | Path) -> ConvLlavaProcessor:
    """Of a checkpoint in either layout, without its model.

    Raises:
        InputError: there is none that loads.
    """
    path = official.on_disk(path)
    if official.is_official(path):
        layout = official.look_through(path)
        return official.processor(layout, official.configuration(layout))
    with _loading(path):
        return ConvLlavaProcessor.from_pretrained(path)


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    """What transformers raises over a folder that is none of ours, as one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"{path} does not load as a ConvLLaVA model: {one_line(error)}") from error


def write(
    model: ConvLlavaForConditionalGeneration,
    processor: ConvLlavaProcessor,
    path: Path,
    *,
    weights: dict[str, Tensor] | None = None,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    **texts: str,
) -> None:
    """Save both, and texts as NAME.yaml; the folder appears only when it is complete and replaces an older one.

    Args:
        model: What to save.
        processor: What to save with it.
        path: The folder.
        weights: The model's, where it holds only a share of them itself.
        beside: Path in the folder -> tensors that are no part of the model.
        texts: NAME -> what it says.
    """
    with whole_folder(path) as folder:
        model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)
        for name, tensors in (beside or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            save_file(dict(tensors), folder / name)
        _write_texts(folder, texts)


def write_adapter(adapted: Any, processor: ConvLlavaProcessor, path: Path, base: str | Path, **texts: str) -> None:
    """As `write`, what a `PeftModel` learnt beside its base: a folder, a hub id, or the name of a shipped model."""
    with whole_folder(path) as folder:
        adapters.save(adapted, processor, folder, base)
        _write_texts(folder, texts)


def _write_texts(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


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
    _check_new(destination, dtype)
    if to not in ("convllava", "official"):
        raise InputError(f"there is no layout {to!r}; choose convllava or official")
    if adapters.is_adapter(source):
        raise InputError(f"{source} is an adapter; write it with its base as one checkpoint by `convllava merge`")
    if official.is_official(source):
        found = official.look_up(source, DTYPES[dtype], base)
    elif base is None:
        found = look_up(source, DTYPES[dtype])
    else:
        raise InputError(f"{source} is a whole checkpoint and no LoRA; leave --base out")
    with whole_folder(destination) as folder:
        if to == "convllava":
            found.save(folder, DTYPES[dtype])
        else:
            official.write_official(found, folder)
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
    with _loading(folder):
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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`; renamed to it when the block ends well, removed when it does not."""
    unfinished, older = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "older"))
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield unfinished
        _let_others_read(unfinished)
        shutil.rmtree(older, ignore_errors=True)  # left by a kill
        if path.exists():
            path.rename(older)
        unfinished.rename(path)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise InputError(f"{path} cannot be written: {one_line(error)}") from None
        raise
    shutil.rmtree(older, ignore_errors=True)


def _let_others_read(folder: Path) -> None:
    """Give files of tensors the mode of any new file: safetensors 0.8 writes them for their owner alone
    (https://github.com/safetensors/safetensors/issues/782), and a server that is another user could not load them."""
    usual = folder / ".mode"
    usual.touch()
    mode = usual.stat().st_mode
    usual.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(stat.S_IMODE(mode))
