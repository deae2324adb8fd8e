"""Ask a model, and see what it can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convllava.cli.options import AsJson, ImageMode, MaxPixels, Model, ShortSide, pixels, print_json


def ask(
    image: Annotated[str, typer.Argument(help="Any image file.")],
    question: Annotated[str, typer.Argument(help="In plain words.")],
    model: Model = "tiny",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about an image; the answer streams."""
    from convllava.inference import load

    assistant = load(model, pixels=pixels(image_mode, short_side, max_pixels))
    if as_json:
        print_json(assistant.report(image, question, max_new_tokens=max_new_tokens))
        return
    for piece in assistant.ask(image, question, stream=True, max_new_tokens=max_new_tokens):
        print(piece, end="", flush=True)
    print()


def demo(
    output: Annotated[Path, typer.Option(help="Folder for report.json and answers.png.")] = Path("runs/demo"),
    model: Model = "tiny",
    samples: Annotated[int, typer.Option(min=2, help="Fresh held-out pages to measure on.")] = 200,
) -> None:
    """Measure a model on fresh held-out pages and show its answers about two pages."""
    from convllava.demo import run_demo

    run_demo(model, output, samples)
