"""The command line: one thin function per command, each calling one function that Python users call too."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from convllava import __version__
from convllava.errors import InputError
from convllava.evaluation.cli import app as evaluation
from convllava.options import AsJson, ImageMode, MaxPixels, Model, ShortSide, pixels, print_json, show

app = typer.Typer(
    name="convllava",
    help="Ask pictures, and train the models that answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(evaluation, name="eval")


def main() -> None:
    """Run a command; bad input is one line on stderr and exit code 2."""
    # Bars for loading a file are noise around an answer; our own commands show their own progress.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except InputError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: InputError) -> NoReturn:
    print(f"convllava: {error}", file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
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


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for report.json and answers.png.")] = Path("runs/demo"),
    model: Model = "tiny",
    samples: Annotated[int, typer.Option(min=2, help="Fresh held-out pages to measure on.")] = 200,
) -> None:
    """Measure a model on fresh held-out pages and show its answers about two pages."""
    from convllava.demo import run_demo

    run_demo(model, output, samples)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, see recipes/.")],
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints and logs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Cap every stage at so many steps.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. stages.dense.steps=100.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would train, and which files are missing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Train the stages of a recipe."""
    from convllava.training.recipe import load_recipe

    loaded = load_recipe(recipe, settings or ())
    if dry_run:
        _show_plan(loaded, as_json)
        return
    if as_json:
        raise InputError("--json is for --dry-run; a run writes OUTPUT/log.jsonl")
    if output is None:
        raise InputError("--output is missing: name the folder for checkpoints and logs, or try --dry-run")
    run = _import_training()
    print(run(loaded, output, resume=resume, max_steps=max_steps))


def _show_plan(recipe: Any, as_json: bool) -> None:
    from convllava.training.plan import explain_missing, plan, tables_of

    report = plan(recipe)
    show(report, as_json, lambda: tables_of(report))
    if not as_json:
        print(explain_missing(report) or "no file is missing")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint: a folder or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    to: Annotated[str, typer.Option(help="convllava, or official: the layout of the original code.")] = "convllava",
    base: Annotated[str | None, typer.Option(help="What a LoRA of the original code was trained on.")] = None,
) -> None:
    """Write a published checkpoint as ours, ours as a published one, or either in another precision."""
    from convllava import checkpoints

    source = source if Path(source).is_dir() else checkpoints.find(source)
    if note := checkpoints.convert(source, destination, dtype, to=to, base=base):
        print(note, file=sys.stderr)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A published architecture such as convllava-1536-7b, or a checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Show what a model is made of and what it costs, without allocating it."""
    from convllava.inspection import inspect, tables_of

    report = inspect(name)
    show(report, as_json, lambda: tables_of(report))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="tiny, a folder, or a hub id.")],
    path: Annotated[Path, typer.Argument(help="A file that ends in .onnx, or in .xml for OpenVINO.")],
) -> None:
    """Write vision tower and projector for other runtimes, with any height and width, checked against the model."""
    from convllava.export import export as run
    from convllava.inference import load

    difference = run(load(model, device="cpu").model, path)
    print(f"{path}: differs by at most {difference:.1e} from the model")


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="tower, training, mixed, scale, first-token or pixels.")],
    towers: Annotated[str, typer.Option(help="Of T, S, B, L, separated by commas.")] = "T",
    sides: Annotated[str, typer.Option(help="Of square images, separated by commas.")] = "768",
    language: Annotated[str, typer.Option(help="Shape of the language model: 135m, 0.5b, 7b.")] = "135m",
    peers: Annotated[bool, typer.Option("--peers", help="first-token: other models' encoders too.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each, taken in turns.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of one operation.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder for SUITE.json and SUITE.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory side by side with a baseline."""
    from convllava.bench.report import run, table_of

    report = run(suite, towers.split(","), sides.split(","), language, peers, repeats, threads, output)
    show(report, as_json, lambda: [table_of(report)])


def _import_training() -> Any:
    try:
        from convllava.training.engine import train as run
    except ImportError as error:
        raise InputError(f"training needs {error.name}; pip install 'convllava[train]'") from None
    return run
