"""Where the parts of a published checkpoint lie: looked through, not loaded."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from convllava.checkpoints.original_names import OUR_TOWER, rename_language, rename_tower, rename_trained
from convllava.checkpoints.tensors import VOCABULARY, tensor_files, tensors_in
from convllava.errors import InputError
from convllava.io import is_hub_id, one_line, read_json

MODEL_TYPE = "llava_llama"
MODEL_TYPES = (MODEL_TYPE, "llava")
ADAPTER_CONFIG = "adapter_config.json"
_KNOWN: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "image_aspect_ratio": ("pad", "square", None),
    "mm_vision_select_layer": (-1, -2),
}
_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "vision_tower/*"]


Origin = Literal["trained", "tower", "language", "named tower"]
"""Where a file belongs: beside a LoRA, to the checkpoint's own tower, to its shards, to the tower its training began
with."""


@dataclass(frozen=True)
class Source:
    """One file of tensors: where it belongs, and how they are named in our model (None: not wanted)."""

    path: Path
    origin: Origin
    rename: Callable[[str], str | None]

    def new_names(self) -> list[str]:
        """Of the tensors that are wanted."""
        return [new for new in map(self.rename, tensors_in(self.path)) if new is not None]


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
    """The folder of a checkpoint in the published layout that goes by a hub id, fetched if need be; anything else
    passes through, for transformers to load or refuse.

    Raises:
        InputError: it is one by its name or its config.json, and cannot be fetched.
    """
    if Path(name).exists() or not is_hub_id(str(name)):
        return name
    if not str(name).startswith("ConvLLaVA/"):
        try:
            config = read_json(Path(hf_hub_download(str(name), "config.json")))
        except (OSError, ValueError, HfHubHTTPError, InputError):
            return name
        if config.get("model_type") not in MODEL_TYPES:
            return name
    return _fetched(str(name))


def _fetched(name: str) -> Path:
    """The folder of a hub id, fetched if need be; a path that exists, and what is no hub id, as it is."""
    if Path(name).exists() or not is_hub_id(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{name} cannot be fetched: {one_line(error)}") from None


def is_official(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint in a layout of the original code."""
    folder = Path(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("model_type") == "convllava":
        return False
    return (folder / ADAPTER_CONFIG).is_file() or (
        config.get("model_type") in MODEL_TYPES and "mm_vision_tower" in config
    )


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
    if adapter is None and base is not None:
        raise InputError(f"{folder} is a whole checkpoint and no LoRA; leave --base out")
    language = folder if adapter is None else _base_of(folder, adapter, base)
    config = read_json((folder if (folder / "config.json").is_file() else language) / "config.json")
    _check_known(folder, config)
    own, named = _towers(folder, language, config)
    trained = folder / "non_lora_trainables.bin"
    sources = [
        *(Source(path, "trained", rename_trained) for path in [trained] if adapter is not None and path.is_file()),
        *(Source(path, "tower", rename_tower) for path in (tensor_files(own, required=False) if own else [])),
        *(Source(path, "language", rename_language) for path in tensor_files(language)),
        *(Source(path, "named tower", rename_tower) for path in (tensor_files(named, required=False) if named else [])),
    ]
    _check_own_tower(own, sources)
    has_tower = own is not None or _in_shards(sources)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", VOCABULARY))
    return Layout(
        folder=folder,
        config=config,
        tower_folder=own or named or folder,
        sources=[source for source in sources if not (has_tower and source.origin == "named tower")],
        tokenizer_folder=folder if has_tokenizer else language,
        deltas={} if adapter is None else _deltas(folder, adapter),
        note="; ".join(_notes(own, named, sources, adapter is not None and not trained.is_file())),
    )


def _in_shards(sources: Iterable[Source]) -> bool:
    """Whether the tower is among the language model's tensors."""
    shards = (source for source in sources if source.origin == "language")
    return any(name.startswith(OUR_TOWER) for source in shards for name in source.new_names())


def _check_known(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings of LLaVA that ConvLLaVA's code knows and its published models do not use."""
    for key, known in _KNOWN.items():
        if config.get(key, known[0]) not in known:
            allowed = " or ".join(str(value) for value in known)
            raise InputError(f"{folder / 'config.json'} sets {key} to {config[key]!r}; only {allowed} is known")


def _check_own_tower(own: Path | None, sources: list[Source]) -> None:
    """Refuse a checkpoint whose own tower has lost its file: another one would pass for it."""
    if own is None or any(source.origin == "tower" for source in sources):
        return
    if not _in_shards(sources):
        raise InputError(f"{own} has a config.json but neither model.safetensors nor pytorch_model.bin; fetch it again")


def _towers(folder: Path, language: Path, config: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """The checkpoint's own tower, and the one its config.json names: the one that its training was given."""
    places = [place / "vision_tower" for place in dict.fromkeys((folder, language))]
    own = next((place for place in places if (place / "config.json").is_file()), None)
    name = config.get("mm_vision_tower") or ""
    if not isinstance(name, str):
        raise InputError(f"{folder / 'config.json'}: mm_vision_tower must be a path; got {name!r}")
    candidates = [Path(name) if own else _fetched(name), folder / name]
    named = next((place for place in candidates if name and (place / "config.json").is_file()), None)
    if own is None and named is None:
        raise InputError(
            f"{folder} has no vision tower: neither {places[0]} nor mm_vision_tower {name!r} holds a config.json; "
            "put the tower's folder beside the model as vision_tower"
        )
    return own, named if own is None or named is None or named.resolve() != own.resolve() else None


def _notes(own: Path | None, named: Path | None, sources: list[Source], untrained: bool) -> Iterator[str]:
    files = {origin: [part for part in sources if part.origin == origin] for origin in ("tower", "named tower")}
    if files["tower"] and files["named tower"] and not _same(files["tower"], files["named tower"]):
        yield f"took the tower in {own}; mm_vision_tower names another, {named}"
    if files["tower"] and _in_shards(sources):
        yield f"took the tower in {own}; there is another among the language model's tensors"
    if untrained:
        yield "the LoRA came without non_lora_trainables.bin: the projector is that of its base"


def _same(one: list[Source], other: list[Source]) -> bool:
    """Whether two towers are the same files."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(filecmp.cmp(a.path, b.path, shallow=False) for a, b in pairs)


def _base_of(folder: Path, adapter: Mapping[str, Any], base: str | Path | None) -> Path:
    place = _fetched(str(base or adapter.get("base_model_name_or_path") or ""))
    if not (place / "config.json").is_file():
        raise InputError(f"{folder} is a LoRA on {str(place)!r}, which is not here; convert it with --base FOLDER")
    return place


def _deltas(folder: Path, adapter: Mapping[str, Any]) -> dict[str, Delta]:
    """What the adapter's file adds to which of our weights."""
    for setting in ("use_dora", "rank_pattern", "alpha_pattern"):
        if adapter.get(setting):
            raise InputError(f"{folder / ADAPTER_CONFIG} sets {setting}, which the original code does not write")
    if not all(isinstance(adapter.get(key), int | float) and adapter[key] > 0 for key in ("r", "lora_alpha")):
        raise InputError(f"{folder / ADAPTER_CONFIG} lacks r or lora_alpha, numbers above 0; it is not a LoRA's")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors or adapter_model.bin")
    scale = adapter["lora_alpha"] / (adapter["r"] ** 0.5 if adapter.get("use_rslora") else adapter["r"])
    tensors = tensors_in(files[0])
    if not any(".lora_A." in name for name in tensors):
        raise InputError(f"{files[0]} holds no LoRA: none of its tensors is a lora_A")
    deltas: dict[str, Delta] = {}
    for down in (name for name in tensors if ".lora_A." in name):
        up = down.replace(".lora_A.", ".lora_B.")
        new = rename_trained(re.sub(r"\.lora_A(\.default)?\.", ".", down))
        if new is None or up not in tensors:
            raise InputError(f"{files[0]} has {down} but not {up}")
        deltas[new] = Delta(tensors[down], tensors[up], scale)
    return deltas
