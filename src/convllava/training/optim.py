"""Which parts of a model train, and the parameter groups of the optimizer with their learning rates."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from convllava.errors import ConfigError, nearest
from convllava.model.part_names import parts_of
from convllava.training.recipe import Stage


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze all parts of the model except the named ones.

    Raises:
        ConfigError: if the model has no such part.
    """
    parts, names = parts_of(model), set(names)
    for part in sorted(names - set(parts)):
        hint = nearest(part, parts) or f"; it has {', '.join(parts)}"
        raise ConfigError(f"learning_rates: the model has no part {part!r}{hint}")
    for part, parameters in parts.items():
        for _, parameter in parameters:
            parameter.requires_grad_(part in names)


_LANGUAGE = re.compile(r"(?:^|\.)(?:lm_head|language_model)\.")
_EMBEDDINGS = re.compile(r"\.embed(?!ding_norm)")
"""Embeddings, with their norms and projections; embedding_norm is the last norm of LFM2."""
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_CHANNEL_MIXING = re.compile(r"_proj\.|pwconv\d\.|downsampling_layer\.1\.|linear_\d\.")


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer, each from one part.

    Matrices have weight decay, vectors (norms, biases, LayerScale) have none. If learning rates decay from layer to
    layer, each layer has its own groups. With Muon the matrices that mix channels inside the network are groups with
    `"muon": True`; embeddings, heads, the stem, depthwise convolutions and adapters are not among them.
    """
    groups = []
    for part, parameters in parts_of(model).items():
        depth = 1 + max(layer_of(name, 0) for name, _ in parameters)
        kinds: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
        for name, parameter in parameters:
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.ndim > 1
            inside = is_matrix and part not in ("stem", "head") and ".lora_" not in name
            muon = stage.optimizer == "muon" and inside and bool(_CHANNEL_MIXING.search(name))
            below = depth - 1 - layer_of(name, depth) if part in stage.layer_decays else 0
            kinds.setdefault((is_matrix, muon, below), []).append(parameter)
        for (is_matrix, muon, below), chosen in kinds.items():
            rate = stage.learning_rates[part] * stage.layer_decays.get(part, 1.0) ** below
            decay = stage.weight_decays.get(part, stage.weight_decay) if is_matrix else 0.0
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "part": part, "muon": muon})
    return groups


def layer_of(name: str, depth: int) -> int:
    """Return the layer, among the `depth` layers of its part, that a parameter belongs to.

    Parameters before the first layer (embeddings, the downsampling of a stage) are in layer -1; those after the last
    one (norm and head) count as the last.
    """
    if match := _LAYER.search(name):
        return int(match[1])
    return depth - 1 if _LANGUAGE.search(name) and not _EMBEDDINGS.search(name) else -1
