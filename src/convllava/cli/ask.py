"""Commands that ask a model: `ask` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convllava.cli.options import AsJson, ImageMode, MaxPixels, Model, ShortSide, pixels, print_json
from convllava.errors import ConfigError


def ask(
    image: Annotated[str | None, typer.Argument(help="Any image file.")] = None,
    question: Annotated[str | None, typer.Argument(help="Plain text.")] = None,
    model: Model = "tiny",
    questions: Annotated[
        Path | None,
        typer.Option("--input", help='A file of questions, JSON lines {"id", "image", "question"}; needs --output.'),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help='Answers to --input: {"id", "answer"} or {"id", "error"}. A killed run continues.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about an image, or a file of questions. A single answer appears while it is written."""
    settings = pixels(image_mode, short_side, max_pixels)
    if image is not None and question is not None and questions is output is None:
        from convllava.inference import load

        assistant = load(model, pixels=settings)
        if as_json:
            print_json(assistant.report(image, question, max_new_tokens=max_new_tokens))
            return
        for piece in assistant.stream(image, question, max_new_tokens=max_new_tokens):
            print(piece, end="", flush=True)
        print()
    elif image is question is None and questions is not None and output is not None:
        from convllava.inference.batch import answer_file

        summary = answer_file(questions, output, model, pixels=settings, max_new_tokens=max_new_tokens)
        if as_json:
            print_json(summary)
        else:
            print("{output}: {answered} answered, {errors} with errors, {seconds} s".format(**summary))
    else:
        raise ConfigError("give either IMAGE and QUESTION, or --input and --output")


def demo(
    output: Annotated[Path, typer.Option(help="Folder for report.json and answers.png.")] = Path("runs/demo"),
    model: Model = "tiny",
    samples: Annotated[int, typer.Option(min=2, help="Number of generated held-out pages.")] = 200,
) -> None:
    """Measure a model on newly generated held-out pages, and show its answers about two pages."""
    from convllava.evaluation.demo import run_demo

    run_demo(model, output, samples)
