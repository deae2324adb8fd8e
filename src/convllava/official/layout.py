"""Where the parts of a published checkpoint lie: looked through, not loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from convllava.errors import InputError
from convllava.files import VOCABULARY, one_line, read_json, tensor_files, tensors_in
from convllava.official.names import OUR_TOWER, rename_language, rename_own_tower, rename_tower, rename_trained

MODEL_TYPE = "llava_llama"
ADAPTER_CONFIG = "adapter_config.json"
_PUBLISHED = re.compile(r"ConvLLaVA/[\w.-]+")
"""Hub ids whose repositories are in the published layout."""


@dataclass(frozen=True)
class Source:
    """One file of tensors: how they are named in it, and how in our model (None: not wanted)."""

    path: Path
    rename: Callable[[str], str | None]


@dataclass(frozen=True)
class Delta:
    """What LoRA adds to a weight: scale * up @ down."""

    down: Tensor
    up: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged weight, in float32."""
        return weight.float() + self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Layout:
    """An official checkpoint, looked through but not loaded.

    Attributes:
        folder: Of the checkpoint.
        config: Its config.json.
        tower_folder: Where the tower's config.json and preprocessor_config.json lie.
        sources: The files to read; of a tensor that is in several, the first counts.
        tokenizer_folder: Where the tokenizer lies.
        deltas: Our name -> what LoRA adds to that weight.
        note: What a user should know of it; empty if nothing.
    """

    folder: Path
    config: dict[str, Any]
    tower_folder: Path
    sources: list[Source]
    tokenizer_folder: Path
    deltas: dict[str, Delta]
    note: str = ""


def on_disk(name: str | Path) -> str | Path:
    """The folder of a published checkpoint that goes by a hub id, fetched if need be; anything else passes through.

    Raises:
        InputError: it cannot be fetched.
    """
    if Path(name).exists() or not _PUBLISHED.fullmatch(str(name)):
        return name
    try:
        return snapshot_download(
            str(name), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "vision_tower/*"]
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{name} cannot be fetched: {one_line(error)}") from None


def is_official(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint in a layout of the original code."""
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return config.get("model_type") in (MODEL_TYPE, "llava") and "mm_vision_tower" in config


def look_through(folder: str | Path, base: str | Path | None = None) -> Layout:
    """Find the parts of an official checkpoint.

    Args:
        folder: The checkpoint.
        base: The language model that a LoRA was trained on; None takes the one its adapter_config.json names.

    Raises:
        InputError: no tower or no base anywhere, or a file that is missing.
    """
    folder = Path(folder)
    adapter = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
    language = folder if adapter is None else _base_of(folder, adapter, base)
    config = read_json((folder if (folder / "config.json").is_file() else language) / "config.json")
    if config.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
        raise InputError(
            f"{folder} has a projector of the type {config['mm_projector_type']}; only mlp2x_gelu is known"
        )
    own, named = _towers(folder, language, config)
    trained = folder / "non_lora_trainables.bin"
    files = {
        rename_trained: [trained] if adapter is not None and trained.is_file() else [],
        rename_own_tower: tensor_files(own, required=False) if own else [],
        rename_language: tensor_files(language),
        rename_tower: tensor_files(named, required=False) if named else [],
    }
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", VOCABULARY))
    sources = [Source(path, rename) for rename, paths in files.items() for path in paths]
    return Layout(
        folder=folder,
        config=config,
        tower_folder=own or named or folder,
        sources=sources,
        tokenizer_folder=folder if has_tokenizer else language,
        deltas={} if adapter is None else _deltas(folder, adapter),
        note="; ".join(_notes(own, named, sources, adapter is not None and not trained.is_file())),
    )


def _towers(folder: Path, language: Path, config: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """The checkpoint's own tower, and the one its config.json names: the one that its training was given."""
    places = [place / "vision_tower" for place in dict.fromkeys((folder, language))]
    own = next((place for place in places if (place / "config.json").is_file()), None)
    name = config.get("mm_vision_tower") or ""
    candidates = [Path(on_disk(name)) if own is None else Path(name), folder / name]
    named = next((place for place in candidates if name and (place / "config.json").is_file()), None)
    if own is None and named is None:
        raise InputError(
            f"{folder} has no vision tower: neither {places[0]} nor mm_vision_tower {name!r} holds a config.json; "
            "put the tower's folder beside the model as vision_tower"
        )
    return own, named if own is None or named is None or named.resolve() != own.resolve() else None


def _notes(own: Path | None, named: Path | None, sources: list[Source], untrained: bool) -> Iterator[str]:
    if own and named:
        yield f"took the tower in {own}; mm_vision_tower names another, {named}"
    places = {part.rename for part in sources if any(name.startswith(OUR_TOWER) for name in new_names(part))}
    if {rename_own_tower, rename_language} <= places:
        yield f"took the tower in {own}; there is another among the language model's tensors"
    if untrained:
        yield "the LoRA came without non_lora_trainables.bin: the projector is that of its base"


def new_names(part: Source) -> list[str]:
    return [new for new in map(part.rename, tensors_in(part.path)) if new is not None]


def _base_of(folder: Path, adapter: Mapping[str, Any], base: str | Path | None) -> Path:
    place = Path(on_disk(base or adapter.get("base_model_name_or_path") or ""))
    if not (place / "config.json").is_file():
        raise InputError(f"{folder} is a LoRA on {str(place)!r}, which is not here; name the folder with --base")
    return place


def _deltas(folder: Path, adapter: Mapping[str, Any]) -> dict[str, Delta]:
    """What the adapter's file adds to which of our weights."""
    for setting in ("use_dora", "rank_pattern", "alpha_pattern"):
        if adapter.get(setting):
            raise InputError(f"{folder / ADAPTER_CONFIG} sets {setting}, which the original code does not write")
    if not {"r", "lora_alpha"} <= set(adapter):
        raise InputError(f"{folder / ADAPTER_CONFIG} lacks r or lora_alpha; it is not a LoRA's")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors or adapter_model.bin")
    scale = adapter["lora_alpha"] / (adapter["r"] ** 0.5 if adapter.get("use_rslora") else adapter["r"])
    tensors = tensors_in(files[0])
    deltas: dict[str, Delta] = {}
    for down in (name for name in tensors if ".lora_A." in name):
        up = down.replace(".lora_A.", ".lora_B.")
        new = rename_trained(re.sub(r"\.lora_A(\.default)?\.", ".", down))
        if new is None or up not in tensors:
            raise InputError(f"{files[0]} has {down} but not {up}")
        deltas[new] = Delta(tensors[down], tensors[up], scale)
    return deltas
