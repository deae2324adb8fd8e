"""Options that several commands have, and how commands print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from convllava.errors import InputError

Model = Annotated[str, typer.Option("--model", "-m", help="tiny (in the package), a folder, or a hub id.")]
ImageMode = Annotated[
    str | None,
    typer.Option(help="native, square, short_side or crop, in place of what the model was trained with."),
]
ShortSide = Annotated[int | None, typer.Option(min=1, help="Pixels of the short side, for --image-mode short_side.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Most pixels of an image, where its aspect ratio is kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of text.")]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def pixels(image_mode: str | None, short_side: int | None, max_pixels: int | None) -> dict[str, Any]:
    """The options as settings of the image processor."""
    if short_side is not None and image_mode != "short_side":
        raise InputError("--short-side has a meaning with --image-mode short_side only")
    settings = {"mode": image_mode, "side": short_side, "max_pixels": max_pixels}
    return {name: value for name, value in settings.items() if value is not None}


def numbers(option: str, text: str, of: int = 1) -> list[int]:
    """Whole numbers above 0, multiples of another, separated by commas."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) and int(part) % of == 0 for part in parts):
        what = "whole numbers above 0" if of == 1 else f"multiples of {of}"
        raise InputError(f"{option} {text}: give {what}, separated by commas")
    return [int(part) for part in parts]


def squares(text: str) -> list[int]:
    """Sides of square images in pixels, which the tower divides into cells of 64."""
    return numbers("--sides", text, of=64)


def show(report: Any, as_json: bool, tables: Callable[[], Iterable[Any]]) -> None:
    """A report for a program or for a person."""
    if as_json:
        print_json(report)
        return
    from rich.console import Console

    for table in tables():
        print(table) if isinstance(table, str) else Console().print(table)


def print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False))
