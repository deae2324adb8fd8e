"""Checkpoints on disk: find, read, write, convert and merge them, in our layout or the published one.

    convllava convert ConvLLaVA/ConvLLaVA-sft-1536 my-model

docs/checkpoints.md describes the layouts and the name of each tensor in both.
"""

from convllava.checkpoints.conversion import convert, look_up, merge
from convllava.checkpoints.reading import SHIPPED, configuration, find, processor, read
from convllava.checkpoints.writing import whole_folder, write, write_adapter

__all__ = [
    "SHIPPED",
    "configuration",
    "convert",
    "find",
    "look_up",
    "merge",
    "processor",
    "read",
    "whole_folder",
    "write",
    "write_adapter",
]
