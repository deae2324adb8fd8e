"""Questions as conversations: the benchmark's form of words around them, and images where they belong."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from convllava.errors import InputError
from convllava.evaluation.benchmarks import Benchmark
from convllava.evaluation.questions import Picture, Question

if TYPE_CHECKING:
    from convllava.inference.types import Message

FIELDS = ("question", "options", "hint")


def check_template(template: str) -> str:
    """A form of words for prompts, as it came.

    Raises:
        InputError: a field that is none of `FIELDS`, or no `{question}`.
    """
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise InputError(f"--prompt {template!r}: {error}") from None
    if not named <= set(FIELDS) or "question" not in named:
        raise InputError(f"--prompt {template!r} must contain {{question}}, and may {{options}} and {{hint}}, no other")
    return template


def templates_of(benchmark: Benchmark, template: str | None) -> dict[str, str]:
    """The forms that questions without and with options take; one given by the user takes the place of both."""
    return {"open": template or benchmark.open_prompt, "choice": template or benchmark.choice_prompt}


def prompt(question: Question, templates: dict[str, str]) -> str:
    """The text that is asked. Options stand a line each, "A. a dog"; a hint stands on a line of its own."""
    options = "\n".join(
        f"{letter}. {option}" for letter, option in zip(question.letters, question.options, strict=True)
    )
    template = templates["choice" if question.options else "open"]
    return template.format(
        question=question.text, options=options, hint=f"{question.hint}\n" if question.hint else ""
    ).strip()


def conversation(question: Question, templates: dict[str, str]) -> tuple[list[Message], list[Picture]]:
    """One message of the user, and the pictures in the order in which it shows them.

    Pictures come first, or where MMMU's text has <image 1>, <image 2>, ...
    """
    text = prompt(question, templates)
    marks: Sequence[int] = question.details.get("marks", ())
    if not marks:
        return [{"role": "user", "content": text}], list(question.pictures)
    parts: list[dict[str, str]] = []
    shown: list[Picture] = []
    for place, piece in enumerate(re.split(r"<image (\d)>", text)):
        if place % 2:
            parts.append({"type": "image"})
            shown.append(question.pictures[marks.index(int(piece))])
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return [{"role": "user", "content": parts}], shown
