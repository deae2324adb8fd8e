"""`convllava eval`: benchmarks, and what one does with their results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convllava.cli.options import AsJson, ImageMode, MaxPixels, Model, ShortSide, is_given, pixels, show, squares
from convllava.errors import InputError

if TYPE_CHECKING:
    from convllava.synthetic import World

app = typer.Typer(
    help="Run a benchmark; without --benchmark, measure on held-out pages of the generated world.",
    invoke_without_command=True,
)

Name = Annotated[
    str,
    typer.Option(
        help="synthetic, all, or one of mme, mmbench, seedbench, realworldqa, mmmu, mmvet, textvqa, docvqa, pope, "
        "refcoco, refcoco+, refcocog, chartqa, ocrbench, infovqa."
    ),
]
Data = Annotated[Path | None, typer.Option(help="Its file, or a folder with it; with all, a folder of them.")]
Images = Annotated[Path | None, typer.Option(help="Folder of images in files of their own, if not that of the data.")]
Split = Annotated[str | None, typer.Option(help="Part of the names of the files to take, such as validation.")]
Category = Annotated[list[str] | None, typer.Option(help="Only questions of this category; may be repeated.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many of the first questions, with their rotations.")]
JudgeUrl = Annotated[str | None, typer.Option(help="Of an OpenAI-compatible server, such as http://localhost:8000/v1.")]
JudgeModel = Annotated[str | None, typer.Option(help="The model there that judges, for mmvet.")]
Seed = Annotated[int, typer.Option(help="Of the generated pages.")]
PageSize = Annotated[int, typer.Option(help="Square root of the generated pages' area in pixels.")]
Simple = Annotated[bool, typer.Option("--simple", help="The simpler world of recipes/tiny-quick.yaml.")]


@app.callback()
def evaluate(
    context: typer.Context,
    model: Model = "tiny",
    benchmark: Name = "synthetic",
    data: Data = None,
    images: Images = None,
    split: Split = None,
    category: Category = None,
    limit: Limit = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for answers.jsonl, which a killed run continues, and result.json.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Form of words with {question}, {options}, {hint}, for the benchmark's own.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    choices: Annotated[str, typer.Option(help="generate, or likelihood: the likeliest letter.")] = "generate",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered together.")] = 16,
    timed: Annotated[int, typer.Option(min=0, help="Questions asked again with a watch; 0: no efficiency.")] = 5,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    samples: Annotated[int, typer.Option(min=2, help="Generated pages, for synthetic.")] = 1000,
    seed: Seed = 1,
    size: PageSize = 448,
    simple: Simple = False,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
    as_json: AsJson = False,
) -> None:
    """Run a benchmark on files, or measure a model on held-out pages of the generated world."""
    if context.invoked_subcommand is not None:
        _refuse_before(context, context.invoked_subcommand)
        return
    from convllava.evaluation import commands
    from convllava.evaluation.runner import Options

    options = Options(
        images=images,
        split=split,
        categories=tuple(category or ()),
        limit=limit,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        choices=choices,
        batch_size=batch_size,
        timed=timed,
        judge=commands.judge_at(judge_url, judge_model),
    )
    settings = pixels(image_mode, short_side, max_pixels)
    if benchmark == "synthetic":
        _refuse_files(data, images, split, limit, category)
        result = commands.run_synthetic(model, settings, _world(seed, size, simple), samples, options, output)
    else:
        _refuse_pages(context)
        result = commands.run_files(benchmark, model, settings, _required(data, benchmark), options, output)
    show(result, as_json, lambda: commands.tables_of_all(result))


@app.command()
def score(
    benchmark: Name,
    data: Annotated[Path, typer.Option(help="The benchmark's file, or a folder with it.")],
    answers: Annotated[Path, typer.Option(help='JSON lines: {"id": index, "answer": text}.')],
    images: Images = None,
    split: Split = None,
    category: Category = None,
    limit: Limit = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose image geometry boxes are in; without, the image's own.")
    ] = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    as_json: AsJson = False,
) -> None:
    """Score answers that were made elsewhere."""
    from convllava.evaluation import commands
    from convllava.evaluation.report import tables_of
    from convllava.evaluation.runner import Options

    options = Options(images=images, split=split, categories=tuple(category or ()), limit=limit)
    judge = commands.judge_at(judge_url, judge_model)
    result = commands.score_file(benchmark, data, answers, options, model, judge)
    show(result, as_json, lambda: tables_of(result))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A result.json, or the folder it is in.")],
    b: Annotated[Path, typer.Argument(help="Another, of the same questions.")],
    as_json: AsJson = False,
) -> None:
    """Show how much better B is than A, with the interval of the paired difference."""
    from convllava.evaluation.compare import compare as run
    from convllava.evaluation.report import comparison_table

    found = run(a, b)
    show(found, as_json, lambda: [comparison_table(found)])


@app.command()
def plot(
    results: Annotated[list[Path], typer.Argument(help="Results of one benchmark, or their folders.")],
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("eval.png"),
) -> None:
    """Draw scores against seconds to the first token."""
    from convllava.evaluation.plots import plot_results

    plot_results(results, output)
    print(output)


@app.command()
def sweep(
    output: Annotated[Path, typer.Option(help="Folder for sweep.json and sweep.png.")],
    model: Model = "tiny",
    samples: Annotated[int, typer.Option(min=1, help="Held-out pages.")] = 60,
    sides: Annotated[str, typer.Option(help="Resolutions: square roots of areas, by commas.")] = "448,576,704,832,960",
    seed: Seed = 1,
    size: PageSize = 448,
    simple: Simple = False,
    as_json: AsJson = False,
) -> None:
    """Measure what a model reads by the height of the text, at several resolutions."""
    from convllava.evaluation.report import rows_table
    from convllava.evaluation.sweep import sweep as run
    from convllava.inference import load

    report = run(model, load(model), _world(seed, size, simple), samples, squares(sides), output)
    measured = ("n", "accuracy", "low", "high")
    tables = {"resolutions": ("side", *measured), "rows": ("side", "from", "to", *measured)}
    show(report, as_json, lambda: [rows_table(f"{model}: {key}", report[key], tables[key]) for key in tables])


@app.command()
def robustness(
    output: Annotated[Path, typer.Option(help="Folder for robustness.json and robustness.png.")],
    model: Model = "tiny",
    samples: Annotated[int, typer.Option(min=1, help="Held-out pages.")] = 60,
    seed: Seed = 1,
    size: PageSize = 448,
    simple: Simple = False,
    as_json: AsJson = False,
) -> None:
    """Measure what a model loses on disturbed pages and reworded questions."""
    from convllava.evaluation.report import rows_table
    from convllava.evaluation.robustness import robustness as run
    from convllava.inference import load

    report = run(model, load(model), _world(seed, size, simple), samples, output)
    columns = ("kind", "value", "accuracy", "low", "high", "lost", "lost_low", "lost_high")
    title = f"{model}: clean {report['clean']['accuracy']:.1%} of {report['clean']['n']}"
    show(report, as_json, lambda: [rows_table(title, report["rows"], columns)])


def _refuse_before(context: typer.Context, name: str) -> None:
    """Refuse options that stand before a subcommand, which would not see them."""
    group: Any = context.command
    known = {option for parameter in group.commands[name].params for option in parameter.opts}
    for parameter in group.params:
        if is_given(context, parameter.name):
            option = parameter.opts[0]
            place = (
                f"put it behind {name}" if option in known else f"it is for eval alone, and {name} has no such option"
            )
            raise InputError(f"{option} stands before {name}, which does not see it; {place}")


def _refuse_pages(context: typer.Context) -> None:
    if any(is_given(context, name) for name in ("samples", "seed", "size", "simple")):
        raise InputError(
            "--samples, --seed, --size and --simple are for the generated world; of a benchmark on files, --limit says "
            "how much"
        )


def _world(seed: int, size: int, simple: bool) -> World:
    from convllava.synthetic import World

    return World("heldout", seed=seed, size=size, simple=simple)


def _required(data: Path | None, benchmark: str) -> Path:
    if data is None:
        from convllava.evaluation.benchmarks import benchmark_named

        if benchmark != "all":
            benchmark_named(benchmark)
        raise InputError(f"--data is missing: name the file or folder of {benchmark}")
    return data


def _refuse_files(*given: Any) -> None:
    if any(value is not None for value in given):
        raise InputError(
            "--data, --images, --split, --limit and --category are for benchmarks on files: name one with --benchmark; "
            "of the generated world, --samples says how much"
        )
