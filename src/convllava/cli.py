"""The command line: one thin function per command, each calling one function that Python users call too."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from convllava import __version__
from convllava.errors import InputError

app = typer.Typer(
    name="convllava",
    help="Ask pictures, and train the models that answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data = typer.Typer(help="Look at the data of a recipe before it trains.", no_args_is_help=True)
app.add_typer(data, name="data")

RecipeFile = Annotated[Path, typer.Argument(help="A YAML file, see recipes/.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. stages.dense.steps=100.")
]
Model = Annotated[str, typer.Option("--model", "-m", help="tiny (in the package), a folder, or a hub id.")]
ImageMode = Annotated[
    str | None,
    typer.Option(help="native, square, short_side or crop, in place of what the model was trained with."),
]
ShortSide = Annotated[int | None, typer.Option(min=1, help="Pixels of the short side, for --image-mode short_side.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Most pixels of an image, where its aspect ratio is kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of text.")]


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

    assistant = load(model, pixels=_pixels(image_mode, short_side, max_pixels))
    if as_json:
        _print_json(assistant.report(image, question, max_new_tokens=max_new_tokens))
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
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints and logs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Cap every stage at so many steps.")] = None,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would train, and which files are missing.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: that would train together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Train the stages of a recipe."""
    from convllava.training.recipe import load_recipe

    loaded = load_recipe(recipe, settings or ())
    if dry_run:
        _show_plan(loaded, processes, as_json)
        return
    if as_json:
        raise InputError("--json is for --dry-run; a run writes OUTPUT/log.jsonl")
    if output is None:
        raise InputError("--output is missing: name the folder for checkpoints and logs, or try --dry-run")
    run = _import_training()
    print(run(loaded, output, resume=resume, max_steps=max_steps))


def _show_plan(recipe: Any, processes: int, as_json: bool) -> None:
    from convllava.training.plan import explain_missing, plan, tables_of

    report = plan(recipe, processes)
    _show(report, as_json, lambda: tables_of(report))
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
def merge(
    adapter: Annotated[str, typer.Argument(help="The folder of a stage that trained an adapter.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    base: Annotated[str | None, typer.Option(help="What it was trained on, if that is elsewhere now.")] = None,
) -> None:
    """Write an adapter and its base as one plain checkpoint."""
    from convllava import checkpoints

    checkpoints.merge(adapter, destination, dtype, base)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A published architecture such as convllava-1536-7b, or a checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Show what a model is made of and what it costs, without allocating it."""
    from convllava.inspection import inspect, tables_of

    report = inspect(name)
    _show(report, as_json, lambda: tables_of(report))


@app.command(name="eval")
def evaluate(
    model: Model = "tiny",
    samples: Annotated[int, typer.Option(min=2, help="Held-out pages.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the pages.")] = 1,
    size: Annotated[int, typer.Option(help="Square root of the pages' area in pixels.")] = 448,
    simple: Annotated[bool, typer.Option("--simple", help="The simpler world of recipes/tiny-quick.yaml.")] = False,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on held-out pages of the generated world, beside the same model with the wrong image."""
    from convllava.evaluation.synthetic import measure, table_of
    from convllava.inference import load
    from convllava.synthetic import World

    assistant = load(model, pixels=_pixels(image_mode, short_side, max_pixels))
    report = measure(assistant, World("heldout", seed=seed, size=size, simple=simple), samples)
    _show(report, as_json, lambda: [table_of(report, f"{model} on {samples} held-out pages")])


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
def serve(
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="CONVLLAVA_API_KEY", help="That clients must bring; better as the variable.")
    ] = None,
    allow_urls: Annotated[str, typer.Option(help="Hosts to fetch images from, separated by commas.")] = "",
    slots: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 8,
    context: Annotated[int | None, typer.Option(min=2, help="Most tokens of prompt and answer.")] = None,
    step_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of one step.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="Of one operation; else torch decides.")] = None,
    cache_mb: Annotated[int, typer.Option(min=0, help="Of encoded images that are remembered.")] = 256,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Of a request.")] = 20,
    max_images: Annotated[int, typer.Option(min=0, help="In one request.")] = 8,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Of an image before it is decoded.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 1024,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that wait for a slot.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request.")] = 300,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Answer OpenAI clients over HTTP; see docs/serving.md."""
    run, limits = _import_serving()
    run(
        model,
        _pixels(image_mode, short_side, max_pixels),
        threads,
        host=host,
        port=port,
        api_key=api_key,
        hosts=[name.strip() for name in allow_urls.split(",") if name.strip()],
        slots=slots,
        context=context,
        step_tokens=step_tokens,
        cache_bytes=cache_mb * 2**20,
        limits=limits(
            body_bytes=max_body_mb * 2**20,
            images=max_images,
            image_pixels=int(max_megapixels * 1e6),
            new_tokens=max_new_tokens,
            queue=max_queue,
            seconds=timeout,
        ),
    )


def _import_serving() -> Any:
    try:
        from convllava.serving.limits import Limits
        from convllava.serving.server import serve as run
    except ImportError as error:
        raise InputError(f"serving needs {error.name}; pip install 'convllava[serve]'") from None
    return run, Limits


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(help="tower, training, mixed, scale, first-token, pixels, decoding, serving or data.")
    ],
    towers: Annotated[str, typer.Option(help="Of T, S, B, L, separated by commas.")] = "T",
    sides: Annotated[str, typer.Option(help="Of square images, separated by commas.")] = "768",
    language: Annotated[str, typer.Option(help="Shape of the language model: 135m, 0.5b, 7b.")] = "135m",
    peers: Annotated[bool, typer.Option("--peers", help="first-token, serving: what others do, too.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each, taken in turns.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of one operation.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder for SUITE.json and SUITE.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory side by side with a baseline."""
    from convllava.bench.report import run, table_of

    report = run(suite, towers.split(","), sides.split(","), language, peers, repeats, threads, output)
    _show(report, as_json, lambda: [table_of(report)])


@data.command()
def check(
    recipe: RecipeFile,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="Folder for report.jsonl, summary.json, sizes.png.")] = Path(
        "runs/check"
    ),
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Read every sample of a recipe's files, and tell what is wrong with them; an interrupted check goes on."""
    from convllava.training.checking import check as run
    from convllava.training.checking import table_of, verdict
    from convllava.training.recipe import load_recipe

    summary = run(load_recipe(recipe, settings or ()), output, workers)
    _show(summary, as_json, lambda: [table_of(summary)])
    if told := verdict(summary):
        raise InputError(told)


@data.command()
def preview(
    recipe: RecipeFile,
    stage: Annotated[str | None, typer.Option(help="By its name; the first one if not given.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many, the first that the stage sees.")] = 6,
    output: Annotated[Path, typer.Option(help="A picture.")] = Path("preview.png"),
    settings: Settings = None,
) -> None:
    """Draw samples as the model will see them: pixels, visual tokens, and which text is supervised."""
    from convllava.training.preview import preview as run
    from convllava.training.recipe import load_recipe

    run(load_recipe(recipe, settings or ()), stage, samples, output)
    print(output)


def _pixels(image_mode: str | None, short_side: int | None, max_pixels: int | None) -> dict[str, Any]:
    """The options as settings of the image processor."""
    if short_side is not None and image_mode != "short_side":
        raise InputError("--short-side has a meaning with --image-mode short_side only")
    settings = {"mode": image_mode, "side": short_side, "max_pixels": max_pixels}
    return {name: value for name, value in settings.items() if value is not None}


def _import_training() -> Any:
    try:
        from convllava.training.engine import train as run
    except ImportError as error:
        raise InputError(f"training needs {error.name}; pip install 'convllava[train]'") from None
    return run


def _show(report: Any, as_json: bool, tables: Callable[[], Iterable[Any]]) -> None:
    """A report for a program or for a person."""
    if as_json:
        _print_json(report)
        return
    from rich.console import Console

    for table in tables():
        Console().print(table)


def _print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False))
