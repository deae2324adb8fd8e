"""The parts of a model by the names that recipes and reports use."""

from __future__ import annotations

import re

from torch import nn

_STAGE = re.compile(r"(?:^|\.)vision_tower\.encoder\.stages\.(\d+)\.")
_PREFIXES = {
    "vision_tower.embeddings.": "stem",
    "multi_modal_projector.": "projector",
    "language_model.": "language_model",
    "lm_head.": "language_model",
    "head.": "head",
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to: stem, stage1 ... stageN, projector, language_model (with its head), or
    head (of the stage that trains it, no part of the model)."""
    if stage := _STAGE.search(name):
        return f"stage{int(stage[1]) + 1}"
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    for prefix, part in _PREFIXES.items():
        if name.startswith(prefix):
            return part
    raise ValueError(f"parameter {name} belongs to no known part")


def parts_of(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every part with its named parameters, in the order of the model; tied parameters are counted once, and of parts
    that PEFT has copied to train them the copy."""
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            parts.setdefault(part_of(name), []).append((name, parameter))
    return parts
