"""A small checkpoint in the official layout, and the outputs of the original code for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convllava.checkpoints import read

DATA = Path(__file__).parent / "data" / "official"
CHECKPOINT = DATA / "checkpoint"
FOUR_STAGES = DATA / "inputs" / "original_convnext"
"""The tower that stage 1 of the original training starts from."""
GOLDEN = load_file(DATA / "golden.safetensors")


def settings_in(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def change(path: Path, **settings: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(settings_in(path) | settings))


def tower_in(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "vision_tower" / "pytorch_model.bin", weights_only=True)


def add_to_shards(folder: Path, tower: Mapping[str, Tensor]) -> None:
    """Add a tower to the tensors of the language model, as a run of the original code saves it."""
    named = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    save_file(load_file(folder / "model.safetensors") | named, folder / "model.safetensors")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the parameters of the model in a folder of either layout."""
    return {name: tensor.clone() for name, tensor in read(folder)[0].state_dict().items()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Return whether both mappings have the same names with equal tensors."""
    return found.keys() == expected.keys() and all(found[name].equal(tensor) for name, tensor in expected.items())
