"""Ask a model, and see what it can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convllava.cli.options import AsJson, ImageMode, MaxPixels, Model, ShortSide, pixels, print_json
from convllava.errors import InputError


def ask(
    image: Annotated[str | None, typer.Argument(help="Any image file.")] = None,
    question: Annotated[str | None, typer.Argument(help="In plain words.")] = None,
    model: Model = "tiny",
    questions: Annotated[
        Path | None, typer.Option("--input", help='Many: JSON lines {"id", "image", "question"}, with --output.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help='Their answers, {"id", "answer"} or {"id", "error"}; a killed run continues.')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about an image; the answer streams. Or answer a file of questions."""
    settings = pixels(image_mode, short_side, max_pixels)
    if image is not None and question is not None and questions is output is None:
        _ask_one(image, question, model, settings, max_new_tokens, as_json)
    elif image is question is None and questions is not None and output is not None:
        _ask_many(questions, output, model, settings, max_new_tokens, as_json)
    else:
        raise InputError("give IMAGE and QUESTION, or --input and --output: both of one pair and none of the other")


def _ask_one(
    image: str, question: str, model: str, settings: dict[str, Any], max_new_tokens: int, as_json: bool
) -> None:
    from convllava.inference import load

    assistant = load(model, pixels=settings)
    if as_json:
        print_json(assistant.report(image, question, max_new_tokens=max_new_tokens))
        return
    for piece in assistant.ask(image, question, stream=True, max_new_tokens=max_new_tokens):
        print(piece, end="", flush=True)
    print()


def _ask_many(
    questions: Path, output: Path, model: str, settings: dict[str, Any], max_new_tokens: int, as_json: bool
) -> None:
    from convllava.inference.batch import answer_file

    summary = answer_file(questions, output, model, pixels=settings, max_new_tokens=max_new_tokens)
    if as_json:
        print_json(summary)
    else:
        print("{output}: {answered} answered, {errors} with errors, {seconds} s".format(**summary))


def chat(
    images: Annotated[list[str] | None, typer.Argument(help="Image files to begin with.")] = None,
    model: Model = "tiny",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Talk about images in the terminal; /image PATH, or a path alone, adds one."""
    from convllava.cli.chat import chat as run

    settings = pixels(image_mode, short_side, max_pixels)
    run(model, images or [], pixels=settings, max_new_tokens=max_new_tokens)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for report.json and answers.png.")] = Path("runs/demo"),
    model: Model = "tiny",
    samples: Annotated[int, typer.Option(min=2, help="Fresh held-out pages to measure on.")] = 200,
) -> None:
    """Measure a model on fresh held-out pages and show its answers about two pages."""
    from convllava.evaluation.demo import run_demo

    run_demo(model, output, samples)
