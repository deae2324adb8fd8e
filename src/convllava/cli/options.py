"""Options that several commands share, and output as JSON or tables."""

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from convllava.errors import ConfigError

Model = Annotated[str, typer.Option("--model", "-m", help="tiny (in the package), a folder, or a hub id.")]
ImageMode = Annotated[
    str | None, typer.Option(help="native, square, short_side or crop, instead of the mode of the checkpoint.")
]
ShortSide = Annotated[int | None, typer.Option(min=1, help="Pixels of the short side, for --image-mode short_side.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Most pixels, for modes that keep the aspect ratio.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def pixels(image_mode: str | None, short_side: int | None, max_pixels: int | None) -> dict[str, Any]:
    """Return the options as settings of the image processor."""
    if short_side is not None and image_mode != "short_side":
        raise ConfigError("--short-side needs --image-mode short_side")
    settings = {"mode": image_mode, "side": short_side, "max_pixels": max_pixels}
    return {name: value for name, value in settings.items() if value is not None}


def numbers(option: str, text: str, of: int = 1) -> list[int]:
    """Parse positive integers separated by commas, each a multiple of `of`."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) and int(part) % of == 0 for part in parts):
        what = "positive integers" if of == 1 else f"multiples of {of}"
        raise ConfigError(f"{option} {text}: give {what}, separated by commas")
    return [int(part) for part in parts]


def squares(text: str) -> list[int]:
    """Parse `--sides`: sides of square images in pixels, multiples of 64."""
    return numbers("--sides", text, of=64)


def show(report: Any, as_json: bool, tables: Callable[[], Iterable[Any]]) -> None:
    """Print a report as JSON, or as the tables that `tables` returns."""
    if as_json:
        print_json(report)
        return
    from rich.console import Console

    for table in tables():
        print(table) if isinstance(table, str) else Console().print(table)


def print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False))
