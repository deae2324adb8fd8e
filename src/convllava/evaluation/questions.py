"""Questions about pictures, in one form for all file formats, and their prompts."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from convllava.errors import ConfigError, DataError
from convllava.model.images import load_image

if TYPE_CHECKING:
    from convllava.inference import Message

FIELDS = ("question", "options", "hint")
"""Fields of a prompt template."""


class Picture(Protocol):
    """An image that is read when it is needed. Equal pictures are the same image, so it is encoded once."""

    def load(self) -> Image.Image:
        """Return the image; raises InputError if it is missing or damaged."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class PictureFile:
    """An image in its own file."""

    path: Path

    def load(self) -> Image.Image:
        return load_image(self.path)


@dataclass(frozen=True)
class MissingPicture:
    """An image that a data file names but does not have; loading it fails with the reason."""

    reason: str

    def load(self) -> Image.Image:
        raise DataError(self.reason)


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: Unique within the benchmark; answers refer to it.
        text: As the file has it, without options.
        pictures: The images, in order.
        truths: Every answer that is right: the letter of a choice, "[x0, y0, x1, y1]" in pixels for a box.
        options: Texts of the options A, B, ...; empty for an open question.
        hint: Text that the file puts before the question.
        categories: The rows of the table that this question counts for.
        group: Questions with the same group are scored together: rotations of one choice, or the pair about one image.
        details: Further values that the benchmark's rule needs.
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
        """The letters of the options: "ABCD" for four."""
        return string.ascii_uppercase[: len(self.options)]


def check_template(template: str) -> str:
    """Return a prompt template unchanged if it is valid.

    Raises:
        ConfigError: if it lacks `{question}` or has a field that is not in `FIELDS`.
    """
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError(f"`prompt` {template!r} is not a template: {error}") from None
    if not named <= set(FIELDS) or "question" not in named:
        raise ConfigError(f"`prompt` {template!r} must contain {{question}}; it may contain {{options}} and {{hint}}")
    return template


def prompt(question: Question, templates: Mapping[str, str]) -> str:
    """Return the text that is asked. Each option is a line such as "A. a dog"; the hint is a line before the question.

    Args:
        templates: "open" for questions without options, "choice" for those with options.
    """
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(question.letters, question.options, strict=True))
    hint = f"{question.hint}\n" if question.hint else ""
    template = templates["choice" if question.options else "open"]
    return template.format(question=question.text, options=options, hint=hint).strip()


def conversation(question: Question, templates: Mapping[str, str]) -> tuple[list[Message], list[Picture]]:
    """Return one user message, and the pictures in the order in which the message shows them.

    Pictures come first. If the text has MMMU's <image 1>, <image 2>, ..., they are placed there.
    """
    text = prompt(question, templates)
    marks: Sequence[int] = question.details.get("marks", ())
    if not marks:
        return [{"role": "user", "content": text}], list(question.pictures)
    parts: list[dict[str, str]] = []
    pictures: list[Picture] = []
    for number, piece in enumerate(re.split(r"<image (\d)>", text)):
        if number % 2:
            parts.append({"type": "image"})
            pictures.append(question.pictures[marks.index(int(piece))])
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return [{"role": "user", "content": parts}], pictures
