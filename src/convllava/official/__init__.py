"""Published ConvLLaVA checkpoints: read in any layout they come in, written as ours, and back.

    convllava convert ConvLLaVA/ConvLLaVA-sft-1536 my-model

What the layouts are and what each tensor is called on either side: docs/checkpoints.md.
"""

from convllava.official.layout import is_official, look_through, on_disk
from convllava.official.names import rename_tower
from convllava.official.prompt import template
from convllava.official.reading import configuration, load, look_up, processor
from convllava.official.writing import write_official

__all__ = [
    "configuration",
    "is_official",
    "load",
    "look_through",
    "look_up",
    "on_disk",
    "processor",
    "rename_tower",
    "template",
    "write_official",
]
