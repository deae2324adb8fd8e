"""Adapters: folders with the weights that LoRA has trained, without the checkpoint that they change (the base).

A folder holds PEFT's files (`adapter_config.json`, `adapter_model.safetensors`), our configuration and the processor.
PEFT's file also contains the parts that were trained as a whole: the projector and stages of the tower.
`checkpoints.read` merges an adapter into its base;

    convllava merge runs/mine/0-lora merged

writes the merged checkpoint. LoRA: arXiv 2106.09685. DoRA: arXiv 2402.09353.
"""

import copy
import os
from pathlib import Path
from typing import Any

from convllava.errors import CheckpointError, InputError
from convllava.io import is_hub_id, one_line, read_json, write_json
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor

CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder holds an adapter in our layout."""
    folder = Path(folder)
    has_both = (folder / CONFIG).is_file() and (folder / "config.json").is_file()
    return has_both and read_json(folder / "config.json").get("model_type") == "convllava"


def base_of(folder: str | Path, base: str | Path | None = None) -> str:
    """Return the checkpoint that an adapter was trained on.

    Args:
        folder: The adapter.
        base: Replaces the name in the adapter's configuration. Paths in the configuration are relative to the adapter.

    Raises:
        CheckpointError: if the base is not here.
    """
    folder = Path(folder)
    if base is not None:
        return str(base)
    name = read_json(folder / CONFIG).get(_BASE) or ""
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / CONFIG}: {_BASE} must name a checkpoint; got {name!r}")
    if name and (path := folder / name).is_dir():
        return str(path.resolve())
    if is_hub_id(name) or (name and "/" not in name):
        return name
    raise CheckpointError(
        f"{folder} was trained on {name or 'a checkpoint without a name'}, which is not here; give its folder as `base`"
    )


def apply(
    model: ConvLlavaForConditionalGeneration, folder: str | Path, *, merge: bool = True
) -> ConvLlavaForConditionalGeneration:
    """Apply an adapter to its base.

    Args:
        model: The base. It is changed.
        folder: The adapter.
        merge: Add the adapter to the weights; otherwise return a `PeftModel` that keeps both apart.

    Raises:
        InputError: if PEFT is not installed.
        CheckpointError: if the adapter does not fit the model.
    """
    peft = import_peft()
    try:
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # a damaged file makes torch and safetensors raise nearly anything
        raise CheckpointError(f"{folder} does not load as an adapter of its base: {one_line(error)}") from None
    return adapted.merge_and_unload().eval() if merge else adapted.eval()


def save(adapted: Any, processor: ConvLlavaProcessor, folder: Path, base: str | Path) -> None:
    """Write an adapter, its configuration and its processor into an existing folder.

    Args:
        adapted: The `PeftModel`.
        base: A folder, as a Path; it is stored relative to the adapter, so that both can move together. Or, as a
            string, a hub id or the name of a model in the package.
    """
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    path = folder / CONFIG
    # Both are resolved: after a symbolic link, ".." may lead to another folder than the text of the path suggests.
    name = os.path.relpath(base.resolve(), folder.resolve()) if isinstance(base, Path) else base
    write_json(path, {**read_json(path), _BASE: name})
    model = adapted.get_base_model()
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # how the base was loaded for training
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def import_peft() -> Any:
    """Import PEFT, which only adapters need.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError("adapters need peft; pip install 'convllava[train]'") from None
    return peft
