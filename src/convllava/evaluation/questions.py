"""What every benchmark is made of, whatever file it came from: questions about pictures that are read when needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from convllava.errors import InputError
from convllava.model.images import load_image


class Picture(Protocol):
    """An image that is read when it is needed. Equal pictures are the same image, so that it is encoded once."""

    def load(self) -> Image.Image:
        """The image; raises InputError where it is missing or damaged."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class PictureFile:
    """An image in a file of its own."""

    path: Path

    def load(self) -> Image.Image:
        return load_image(self.path)


@dataclass(frozen=True)
class NoPicture:
    """In place of an image that a file names and does not hold."""

    reason: str

    def load(self) -> Image.Image:
        raise InputError(self.reason)


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: Unique within the benchmark; answers name it.
        text: As the file has it, without options.
        pictures: What it is about, in order.
        truths: Every answer that counts as right. Of a choice, its letter; of a box, "[x0, y0, x1, y1]" in pixels.
        options: Of a choice, the texts of A, B, ...; empty for an open question.
        hint: What the file says before the question.
        categories: All that it counts for in the tables.
        group: Questions that are judged together share it: rotations of one choice, or the pair about one image.
        details: What one benchmark's rule needs beside these.
    """

    id: str
    text: str
    pictures: tuple[Picture, ...]
    truths: tuple[str, ...]
    options: tuple[str, ...] = ()
    hint: str = ""
    categories: tuple[str, ...] = ()
    group: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def letters(self) -> str:
        """Of its options: "ABCD" where there are four."""
        return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(self.options)]
