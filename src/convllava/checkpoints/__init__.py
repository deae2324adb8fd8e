"""Checkpoints on disk: find, read, write, convert and merge them, in our layout or the official one.

    convllava convert ConvLLaVA/ConvLLaVA-sft-1536 my-model

docs/checkpoints.md describes the layouts and the names of the tensors in both.
"""

from convllava.checkpoints.conversion import convert, merge
from convllava.checkpoints.reading import SHIPPED, configuration, find, processor, read
from convllava.checkpoints.writing import whole_folder, write, write_adapter

__all__ = [
    "SHIPPED",
    "configuration",
    "convert",
    "find",
    "merge",
    "processor",
    "read",
    "whole_folder",
    "write",
    "write_adapter",
]
