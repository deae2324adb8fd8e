"""What each tensor is called in a published checkpoint and in ours (the table is in docs/checkpoints.md)."""

from __future__ import annotations

import re

FROM_SHARDS = "model.vision_tower.vision_tower."
OUR_TOWER = "model.vision_tower."
LAYER = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")
"""Stage and block of a tensor of the tower."""


def rename_language(name: str) -> str | None:
    """A name in the language model's files -> ours."""
    if name.startswith(FROM_SHARDS):
        return rename_tower(name.removeprefix(FROM_SHARDS))
    if match := re.fullmatch(r"model\.mm_projector\.([02])\.(\w+)", name):
        return f"model.multi_modal_projector.linear_{int(match[1]) // 2 + 1}.{match[2]}"
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return name


def rename_trained(name: str) -> str | None:
    """A name as PEFT wraps it, in an adapter or in non_lora_trainables.bin -> ours."""
    return rename_language(name.removeprefix("base_model.model."))


def rename_tower(name: str) -> str | None:
    """A name in the tower's file -> ours; the pooled LayerNorm that classification uses is not wanted."""
    name = name.removeprefix("convnext.").removeprefix(FROM_SHARDS)
    if name.startswith(("layernorm.", "classifier.")):
        return None
    return OUR_TOWER + name


def name_for_official(name: str) -> tuple[str, bool]:
    """Our name -> (the original's, whether it belongs in the tower's file)."""
    if name.startswith(OUR_TOWER):
        return name.removeprefix(OUR_TOWER), True
    if match := re.fullmatch(r"model\.multi_modal_projector\.linear_(\d)\.(\w+)", name):
        return f"model.mm_projector.{2 * (int(match[1]) - 1)}.{match[2]}", False
    return name.replace("model.language_model.", "model."), False
