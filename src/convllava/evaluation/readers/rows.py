"""A row of a benchmark's file, and what cells and image files have in common whatever the file."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from convllava.errors import InputError
from convllava.evaluation.questions import Picture
from convllava.model.images import load_image


@dataclass(frozen=True)
class Row:
    """Where it stands ("row 3 of MME.tsv"), its cells by column, and its pictures by the column they are in."""

    where: str
    cells: Mapping[str, Any]
    pictures: Mapping[str, tuple[Picture, ...]]


def listed(cell: Any, *, only_of_texts: bool = False) -> list[str]:
    """A cell that holds one text or several: a list, a list written as Python writes it, or the text itself.

    Args:
        only_of_texts: A written list counts as one where all in it stands in quotation marks; "[8, 3]" is a text.
    """
    if isinstance(cell, list | tuple):
        return [str(item) for item in cell]
    text = str(cell)
    if text.startswith("[") and text.endswith("]"):
        try:
            found = ast.literal_eval(text)  # values only; nothing is run
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        if isinstance(found, list) and not (only_of_texts and any(not isinstance(item, str) for item in found)):
            return [str(item) for item in found]
    return [text]


def decoded(content: bytes, where: str) -> Image.Image:
    """An image from its bytes; what is wrong with them is told with the row they stand in."""
    try:
        return load_image(content)
    except InputError as error:
        raise InputError(f"{where}: the image is {str(error).removeprefix('bytes: ')}") from None


def find_image(folder: Path, name: str) -> Path:
    """Where an image that a row names lies: under the folder by its path or by its last part, or one folder deeper.

    Where it is nowhere, the path under the folder comes back, for the message of whoever opens it.
    """
    last = Path(name).name
    places = [folder / name, folder / last, *(deeper / last for deeper in _folders_in(folder))]
    return next((place for place in places if _is_file(place)), places[0])


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except (OSError, ValueError):  # longer than a name may be, as an image in place of its name is
        return False


@lru_cache(maxsize=16)
def _folders_in(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(entry for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
