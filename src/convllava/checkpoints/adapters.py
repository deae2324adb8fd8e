"""Adapters: folders of what a LoRA has trained, beside the checkpoint that it was trained on.

A folder has PEFT's files (`adapter_config.json`, `adapter_model.safetensors`), in which the parts that trained whole
(projector, stages of the tower) lie too, and our configuration and processor. `checkpoints.read` merges as it loads;

    convllava merge runs/mine/0-lora merged

writes the plain checkpoint. LoRA: arXiv 2106.09685. DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch

from convllava.errors import InputError
from convllava.io import is_hub_id, one_line, read_json, write_json
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor

CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in our layout."""
    folder = Path(folder)
    has_both = (folder / CONFIG).is_file() and (folder / "config.json").is_file()
    return has_both and read_json(folder / "config.json").get("model_type") == "convllava"


def base_of(folder: str | Path, base: str | Path | None = None) -> str:
    """The checkpoint that an adapter was trained on: as given, or as its configuration names it.

    Args:
        folder: The adapter.
        base: In place of the name in the adapter's configuration, whose paths are relative to the adapter.

    Raises:
        InputError: it is not here.
    """
    folder = Path(folder)
    if base is not None:
        return str(base)
    name = read_json(folder / CONFIG).get(_BASE) or ""
    if not isinstance(name, str):
        raise InputError(f"{folder / CONFIG}: {_BASE} must name a checkpoint; got {name!r}")
    if name and (path := folder / name).is_dir():
        return str(path.resolve())
    if is_hub_id(name) or (name and "/" not in name):
        return name
    raise InputError(f"{folder} was trained on {name or 'a checkpoint without a name'}, which is not here; give --base")


def apply(
    model: ConvLlavaForConditionalGeneration, folder: str | Path, *, merge: bool = True
) -> ConvLlavaForConditionalGeneration:
    """The base with what its adapter learnt.

    Args:
        model: The adapter's base, which is changed.
        folder: The adapter.
        merge: Add the adapter to the weights; otherwise it stays beside them, as a `PeftModel`.

    Raises:
        InputError: PEFT is not installed, or the adapter does not fit the model.
    """
    peft = import_peft()
    try:
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # a damaged file makes torch and safetensors raise nearly anything
        raise InputError(f"{folder} does not load as an adapter of its base: {one_line(error)}") from None
    return adapted.merge_and_unload().eval() if merge else adapted.eval()


def save(adapted: Any, processor: ConvLlavaProcessor, folder: Path, base: str | Path) -> None:
    """Write what was trained, the configuration and the processor into a folder that is there.

    Args:
        adapted: The `PeftModel`.
        base: A folder, as a Path, of which the path relative to the adapter is kept, so that both can move together; or
            a hub id or the name of a model that ships with the package.
    """
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a card to fill in
    path = folder / CONFIG
    # Resolved, since ".." of a path through a symbolic link leads elsewhere than its text says.
    name = os.path.relpath(base.resolve(), folder.resolve()) if isinstance(base, Path) else base
    write_json(path, {**read_json(path), _BASE: name})
    model = adapted.get_base_model()
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # of the base while it trained
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def import_peft() -> Any:
    """PEFT, which only adapters need.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError("adapters need peft; pip install 'convllava[train]'") from None
    return peft


def merged_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which precision a base takes up its adapter: half precision would round the small changes away."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
