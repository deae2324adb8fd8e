"""What trains of a model, by its parts, and at which learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from convllava.errors import InputError, nearest
from convllava.model.part_names import parts_of
from convllava.training.recipe import Stage


def freeze_all_but(model: nn.Module, trains: Iterable[str]) -> None:
    """Let exactly the named parts receive gradients.

    Raises:
        InputError: a part that the model does not have.
    """
    parts, trains = parts_of(model), set(trains)
    for part in sorted(trains - set(parts)):
        hint = nearest(part, parts) or f"; it has {', '.join(parts)}"
        raise InputError(f"learning_rates: the model has no part {part!r}{hint}")
    for part, parameters in parts.items():
        for _, parameter in parameters:
            parameter.requires_grad_(part in trains)


_LANGUAGE = re.compile(r"(?:^|\.)(?:lm_head|language_model)\.")
_BEFORE = re.compile(r"\.embed(?!ding_norm)")
"""Embeddings, and norms and projections of them; LFM2 calls its last norm embedding_norm."""
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_CHANNEL_MIXING = re.compile(r"_proj\.|pwconv\d\.|downsampling_layer\.1\.|linear_\d\.")


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Optimiser groups, each of one part: matrices with weight decay and vectors (norms, biases, LayerScale) without;
    where learning rates decay from layer to layer, each layer by itself.

    With Muon the matrices that mix channels inside the network form groups of their own, marked `"muon": True`;
    embeddings, heads, the stem, depthwise convolutions and adapters are not of that kind.
    """
    groups = []
    for part, parameters in parts_of(model).items():
        depth = 1 + max(layer_of(name, 0) for name, _ in parameters)
        kinds: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
        for name, parameter in parameters:
            if parameter.requires_grad:
                below = depth - 1 - layer_of(name, depth) if part in stage.layer_decays else 0
                kinds.setdefault((parameter.ndim > 1, _mixes(part, name, parameter, stage), below), []).append(
                    parameter
                )
        for (is_matrix, mixes, below), chosen in kinds.items():
            rate = stage.learning_rates[part] * stage.layer_decays.get(part, 1.0) ** below
            decay = stage.weight_decays.get(part, stage.weight_decay) if is_matrix else 0.0
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "part": part, "muon": mixes})
    return groups


def _mixes(part: str, name: str, parameter: nn.Parameter, stage: Stage) -> bool:
    """Whether Muon takes a parameter."""
    inside = stage.optimizer == "muon" and parameter.ndim > 1 and part not in ("stem", "head")
    return inside and ".lora_" not in name and bool(_CHANNEL_MIXING.search(name))


def layer_of(name: str, depth: int) -> int:
    """Which of its part's `depth` layers a parameter belongs to: what comes before the first (embeddings, a stage's
    patches) counts as -1, what comes after the last (norm and head) as the last."""
    if match := _LAYER.search(name):
        return int(match[1])
    return depth - 1 if _LANGUAGE.search(name) and not _BEFORE.search(name) else -1
