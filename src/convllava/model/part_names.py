"""Parts of a model as recipes and reports name them: stem, stage1 ... stageN, projector, language_model."""

import re

from torch import nn

_STAGE = re.compile(r"(?:^|\.)vision_tower\.encoder\.stages\.(\d+)\.")
_PARTS = {
    "vision_tower.embeddings": "stem",
    "multi_modal_projector": "projector",
    "language_model": "language_model",
    "lm_head": "language_model",
    "head": "head",
}
"""Module -> part. `head` is trained together with the model by some objectives but is not part of it."""


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to; the language model includes `lm_head`.

    Raises:
        ValueError: if the name belongs to no part.
    """
    if stage := _STAGE.search(name):
        return f"stage{int(stage[1]) + 1}"
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    for module, part in _PARTS.items():
        if name.startswith(f"{module}."):
            return part
    raise ValueError(f"parameter {name} belongs to no known part")


def module_of(part: str) -> str:
    """Return the name of the module in `ConvLlavaForConditionalGeneration` that is this part."""
    if part.startswith("stage"):
        return f"model.vision_tower.encoder.stages.{int(part.removeprefix('stage')) - 1}"
    return "model." + next(module for module, known in _PARTS.items() if known == part)


def parts_of(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the named parameters of every part, in the order of the model.

    Tied parameters are counted once. If PEFT has copied a part to train it, the copy counts and not the original.
    """
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            parts.setdefault(part_of(name), []).append((name, parameter))
    return parts
