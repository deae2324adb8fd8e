"""Published ConvLLaVA checkpoints: read in any layout they come in, written as ours, and back.

    convllava convert ConvLLaVA/ConvLLaVA-sft-1536 my-model

What the layouts are and what each tensor is called on either side: docs/checkpoints.md.
"""

from convllava.official.files import tensor_files, tensors_in
from convllava.official.layout import is_official, look_through, on_disk
from convllava.official.names import rename_tower
from convllava.official.prompt import V1_TEMPLATE
from convllava.official.reading import configuration, convert, load
from convllava.official.writing import write_official

__all__ = [
    "V1_TEMPLATE",
    "configuration",
    "convert",
    "is_official",
    "load",
    "look_through",
    "on_disk",
    "rename_tower",
    "tensor_files",
    "tensors_in",
    "write_official",
]
