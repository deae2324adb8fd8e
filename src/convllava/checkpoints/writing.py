"""Write a checkpoint: its folder is either whole or absent."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from convllava.checkpoints import adapters
from convllava.errors import InputError
from convllava.io import one_line
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor


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
