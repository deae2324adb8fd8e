"""The official checkpoint layout: names of tensors, and where each part of a checkpoint is. Nothing is loaded here.

The table of names is in docs/checkpoints.md.
"""

import filecmp
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from convllava.checkpoints.tensors import VOCABULARY, tensor_files, tensors_in
from convllava.errors import CheckpointError, ConfigError
from convllava.io import is_hub_id, one_line, read_json

MODEL_TYPE = "llava_llama"
MODEL_TYPES = (MODEL_TYPE, "llava")
ADAPTER_CONFIG = "adapter_config.json"
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "image_aspect_ratio": ("pad", "square", None),
    "mm_vision_select_layer": (-1, -2),
}
"""Settings of LLaVA -> the values that published ConvLLaVA models use; the first is the default."""
_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "vision_tower/*"]

TOWER_IN_SHARDS = "model.vision_tower.vision_tower."
OUR_TOWER = "model.vision_tower."
LAYER = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")
"""Stage and block in the name of a tower's tensor."""


def rename_language(name: str) -> str | None:
    """Return our name of a tensor in the language model's files; None if our model has no such tensor."""
    if name.startswith(TOWER_IN_SHARDS):
        return rename_tower(name.removeprefix(TOWER_IN_SHARDS))
    if match := re.fullmatch(r"model\.mm_projector\.([02])\.(\w+)", name):
        return f"model.multi_modal_projector.linear_{int(match[1]) // 2 + 1}.{match[2]}"
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return name


def rename_trained(name: str) -> str | None:
    """Return our name of a tensor that PEFT wrapped: in an adapter or in non_lora_trainables.bin."""
    return rename_language(name.removeprefix("base_model.model."))


def rename_tower(name: str) -> str | None:
    """Return our name of a tensor in the tower's file; None for the pooled LayerNorm, which only classifiers use."""
    name = name.removeprefix("convnext.").removeprefix(TOWER_IN_SHARDS)
    if name.startswith(("layernorm.", "classifier.")):
        return None
    return OUR_TOWER + name


def official_name(name: str) -> tuple[str, bool]:
    """Return the official name of one of our tensors, and whether it belongs in the tower's file."""
    if name.startswith(OUR_TOWER):
        return name.removeprefix(OUR_TOWER), True
    if match := re.fullmatch(r"model\.multi_modal_projector\.linear_(\d)\.(\w+)", name):
        return f"model.mm_projector.{2 * (int(match[1]) - 1)}.{match[2]}", False
    return name.replace("model.language_model.", "model."), False


@dataclass(frozen=True)
class Source:
    """One file of tensors.

    Attributes:
        path: The file.
        origin: non_lora_trainables.bin of a LoRA, the checkpoint's own tower, the language model's files, or the tower
            that config.json names.
        rename: Name in the file -> our name, or None if our model has no such tensor.
    """

    path: Path
    origin: Literal["trained", "tower", "language", "named tower"]
    rename: Callable[[str], str | None]


@dataclass(frozen=True)
class Delta:
    """The change that LoRA adds to a weight: scale * up @ down."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Layout:
    """The parts of an official checkpoint, found but not loaded.

    Attributes:
        folder: The checkpoint.
        config: Content of its config.json.
        tower_folder: Folder with the tower's config.json and preprocessor_config.json.
        sources: The files to read. If several files have a tensor, the first one counts.
        tokenizer_folder: Folder with the tokenizer.
        deltas: Our name -> the change that LoRA adds to that weight.
        note: A remark for the user about the checkpoint; may be empty.
    """

    folder: Path
    config: dict[str, Any]
    tower_folder: Path
    sources: list[Source]
    tokenizer_folder: Path
    deltas: dict[str, Delta]
    note: str = ""


def on_disk(name: str | Path) -> str | Path:
    """Return the folder of an official checkpoint, downloaded if it is named by a hub id.

    Everything else is returned as it is: transformers loads or rejects it.

    Raises:
        CheckpointError: if the hub id names an official checkpoint that cannot be downloaded.
    """
    if Path(name).exists() or not is_hub_id(str(name)):
        return name
    if not str(name).startswith("ConvLLaVA/"):
        try:
            config = read_json(Path(hf_hub_download(str(name), "config.json")))
        except (OSError, ValueError, HfHubHTTPError):  # InputError is a ValueError
            return name
        if config.get("model_type") not in MODEL_TYPES:
            return name
    return _downloaded(str(name))


def _downloaded(name: str) -> Path:
    """Return the folder of a hub id, downloaded if necessary; every other name as a path."""
    if Path(name).exists() or not is_hub_id(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(f"{name} cannot be downloaded: {one_line(error)}") from None


def is_official(folder: str | Path) -> bool:
    """Return whether a folder holds a checkpoint of the original code."""
    folder = Path(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("model_type") == "convllava":
        return False
    is_llava = config.get("model_type") in MODEL_TYPES and "mm_vision_tower" in config
    return is_llava or (folder / ADAPTER_CONFIG).is_file()


def find_parts(folder: str | Path, base: str | Path | None = None) -> Layout:
    """Find the parts of an official checkpoint.

    Args:
        folder: The checkpoint.
        base: The language model that a LoRA was trained on; None takes the one that its adapter_config.json names.

    Raises:
        CheckpointError: if the tower, the base or a file is missing, or a setting is not supported.
        ConfigError: if there is a `base`, but the checkpoint is not a LoRA.
    """
    folder = Path(folder)
    adapter = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
    if adapter is None and base is not None:
        raise ConfigError(f"{folder} is a whole checkpoint and not a LoRA; leave `base` out")
    language = folder
    if adapter is not None:
        language = _downloaded(str(base or adapter.get("base_model_name_or_path") or ""))
        if not (language / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is a LoRA on {str(language)!r}, which is not here; give its folder as `base`"
            )
    path = (folder if (folder / "config.json").is_file() else language) / "config.json"
    config = read_json(path)
    for key, known in _SUPPORTED.items():
        if config.get(key, known[0]) not in known:
            allowed = " or ".join(str(value) for value in known)
            raise CheckpointError(f"{path} sets {key} to {config[key]!r}; only {allowed} is supported")

    own, named = _tower_folders(folder, language, config)
    trained = folder / "non_lora_trainables.bin"
    has_trained = adapter is not None and trained.is_file()
    own_files = tensor_files(own, required=False) if own else []
    named_files = tensor_files(named, required=False) if named else []
    language_files = tensor_files(language)
    in_shards = any(
        (rename_language(name) or "").startswith(OUR_TOWER) for path in language_files for name in tensors_in(path)
    )
    if own is not None and not own_files and not in_shards:
        # Without this check the tower that config.json names would silently replace it.
        raise CheckpointError(
            f"{own} has a config.json but neither model.safetensors nor pytorch_model.bin; download it again"
        )

    notes = []
    identical = len(own_files) == len(named_files) and all(
        filecmp.cmp(a, b, shallow=False) for a, b in zip(own_files, named_files, strict=True)
    )
    if own_files and named_files and not identical:
        notes.append(f"took the tower in {own}; mm_vision_tower names another, {named}")
    if own_files and in_shards:
        notes.append(f"took the tower in {own}; there is another among the language model's tensors")
    if adapter is not None and not has_trained:
        notes.append("the LoRA came without non_lora_trainables.bin: the projector is that of its base")
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", VOCABULARY))
    return Layout(
        folder=folder,
        config=config,
        tower_folder=own or named or folder,
        sources=[
            *([Source(trained, "trained", rename_trained)] if has_trained else []),
            *(Source(path, "tower", rename_tower) for path in own_files),
            *(Source(path, "language", rename_language) for path in language_files),
            *(Source(path, "named tower", rename_tower) for path in named_files if own is None and not in_shards),
        ],
        tokenizer_folder=folder if has_tokenizer else language,
        deltas={} if adapter is None else _lora_deltas(folder, adapter),
        note="; ".join(notes),
    )


def _tower_folders(folder: Path, language: Path, config: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """Return the folder of the checkpoint's own tower, and of another tower that its config.json names, from which the
    training started."""
    places = [place / "vision_tower" for place in dict.fromkeys((folder, language))]
    own = next((place for place in places if (place / "config.json").is_file()), None)
    name = config.get("mm_vision_tower") or ""
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / 'config.json'}: mm_vision_tower must be a path; got {name!r}")
    candidates = [Path(name) if own else _downloaded(name), folder / name]
    named = next((place for place in candidates if name and (place / "config.json").is_file()), None)
    if own is None and named is None:
        raise CheckpointError(
            f"{folder} has no vision tower: neither {places[0]} nor mm_vision_tower {name!r} holds a config.json; "
            "put the tower's folder into the checkpoint as vision_tower"
        )
    is_same = own is not None and named is not None and named.resolve() == own.resolve()
    return own, None if is_same else named


def _lora_deltas(folder: Path, adapter: Mapping[str, Any]) -> dict[str, Delta]:
    """Read the adapter's file: our name -> the change of that weight."""
    for setting in ("use_dora", "rank_pattern", "alpha_pattern"):
        if adapter.get(setting):
            raise CheckpointError(f"{folder / ADAPTER_CONFIG} sets {setting}, which the original code does not write")
    if not all(isinstance(adapter.get(key), int | float) and adapter[key] > 0 for key in ("r", "lora_alpha")):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} lacks r or lora_alpha, numbers above 0; it is not a LoRA")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors or adapter_model.bin")
    scale = adapter["lora_alpha"] / (adapter["r"] ** 0.5 if adapter.get("use_rslora") else adapter["r"])
    tensors = tensors_in(files[0])
    deltas: dict[str, Delta] = {}
    for down in (name for name in tensors if ".lora_A." in name):
        up = down.replace(".lora_A.", ".lora_B.")
        new = rename_trained(re.sub(r"\.lora_A(\.default)?\.", ".", down))
        if new is None or up not in tensors:
            raise CheckpointError(f"{files[0]} has {down} but not {up}")
        deltas[new] = Delta(tensors[down], tensors[up], scale)
    if not deltas:
        raise CheckpointError(f"{files[0]} holds no LoRA: none of its tensors is a lora_A")
    return deltas
