"""Write a checkpoint: its folder is either complete or absent."""

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
from convllava.errors import CheckpointError
from convllava.io import one_line
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor


def write(
    model: ConvLlavaForConditionalGeneration,
    processor: ConvLlavaProcessor,
    path: Path,
    *,
    weights: dict[str, Tensor] | None = None,
    extra_tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    **texts: str,
) -> None:
    """Save a model and its processor. The folder appears only when it is complete and replaces an older one.

    Args:
        model, processor: What to save.
        path: The folder.
        weights: The weights of the model, if it holds only a shard of them itself.
        extra_tensors: Path of a file in the folder -> tensors that are not part of the model.
        texts: Name -> content of a file NAME.yaml.

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    with whole_folder(path) as folder:
        model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)
        for name, tensors in (extra_tensors or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            save_file(dict(tensors), folder / name)
        _write_texts(folder, texts)


def write_adapter(adapted: Any, processor: ConvLlavaProcessor, path: Path, base: str | Path, **texts: str) -> None:
    """Save the trained weights of a `PeftModel`, without its base; see `adapters.save` and `write`.

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    with whole_folder(path) as folder:
        adapters.save(adapted, processor, folder, base)
        _write_texts(folder, texts)


def _write_texts(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder next to `path`. It is renamed to `path` if the block succeeds, and removed if it fails.

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    unfinished, older = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "older"))
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield unfinished
        # safetensors 0.8 creates files that only their owner can read (github.com/safetensors/safetensors/issues/782).
        # A server that runs as another user could not load them. So they get the mode of any new file.
        new_file = unfinished / ".mode"
        new_file.touch()
        mode = stat.S_IMODE(new_file.stat().st_mode)
        new_file.unlink()
        for tensors in unfinished.rglob("*.safetensors"):
            tensors.chmod(mode)
        shutil.rmtree(older, ignore_errors=True)  # left by a killed process
        if path.exists():
            path.rename(older)
        unfinished.rename(path)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"{path} cannot be written: {one_line(error)}") from None
        raise
    shutil.rmtree(older, ignore_errors=True)
