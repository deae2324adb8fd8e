"""`convllava eval`: run benchmarks, and score, compare and plot results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from convllava.cli.options import AsJson, ImageMode, MaxPixels, Model, ShortSide, pixels, show, squares

if TYPE_CHECKING:
    from convllava.synthetic import World


class RunByDefault(TyperGroup):
    """A group of commands in which `convllava eval --model M` is `convllava eval run --model M`."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    help="Evaluate a model. `eval --model M` is short for `eval run --model M`, which uses generated pages.",
)

Name = Annotated[
    str,
    typer.Option(
        help="generated, all, or one of mme, mmbench, seedbench, realworldqa, mmmu, mmvet, textvqa, docvqa, pope, "
        "refcoco, refcoco+, refcocog, chartqa, ocrbench, infovqa."
    ),
]
Data = Annotated[Path | None, typer.Option(help="The benchmark's file or folder; with all, a folder of them.")]
Images = Annotated[Path | None, typer.Option(help="Folder of image files, if not the folder of the data.")]
Split = Annotated[str | None, typer.Option(help="Part of the names of the files to read, such as validation.")]
Categories = Annotated[list[str] | None, typer.Option("--category", help="Only this category; may be repeated.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first questions, with their rotations.")]
JudgeUrl = Annotated[str | None, typer.Option(help="Server with OpenAI's chat protocol, as http://localhost:8000/v1.")]
JudgeModel = Annotated[str | None, typer.Option(help="The model on that server that grades, for mmvet.")]
Seed = Annotated[int, typer.Option(help="Seed of the generated pages.")]
PageSize = Annotated[int, typer.Option(help="Square root of the generated pages' area in pixels.")]
Simple = Annotated[bool, typer.Option("--simple", help="Draw the simpler pages of recipes/tiny-quick.yaml.")]


@app.command()
def run(
    model: Model = "tiny",
    benchmark: Name = "generated",
    data: Data = None,
    images: Images = None,
    split: Split = None,
    categories: Categories = None,
    limit: Limit = None,
    output: Annotated[Path | None, typer.Option(help="Folder for answers and result; a killed run continues.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt template with {question}, {options}, {hint}.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    choices: Annotated[str, typer.Option(help="generate, or likelihood: the most likely letter.")] = "generate",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered together.")] = 16,
    timed: Annotated[int, typer.Option(min=0, help="Questions that are timed; 0: no efficiency.")] = 5,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Number of generated pages; 1000 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the generated pages; 1 by default.")] = None,
    size: Annotated[int | None, typer.Option(help="Square root of their area in pixels; 448 by default.")] = None,
    simple: Simple = False,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
    as_json: AsJson = False,
) -> None:
    """Run a benchmark on files, or on generated pages."""
    from convllava.evaluation import Result, evaluate, evaluate_all
    from convllava.evaluation.report import tables_of

    settings: dict[str, Any] = {
        "output": output,
        "pixels": pixels(image_mode, short_side, max_pixels),
        "images": images,
        "split": split,
        "categories": categories or (),
        "limit": limit,
        "samples": samples,
        "seed": seed,
        "size": size,
        "simple": simple,
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "choices": choices,
        "batch_size": batch_size,
        "timed": timed,
        "judge_url": judge_url,
        "judge_model": judge_model,
    }
    if benchmark != "all":
        result = evaluate(model, benchmark, data, **settings)
        show(result.content, as_json, lambda: tables_of(result))
        return
    results, refused = {}, {}
    for name, found in evaluate_all(model, data, **settings).items():
        if isinstance(found, Result):
            results[name] = found.content
        else:
            refused[name] = str(found)
    show(
        {"benchmarks": results, "refused": refused},
        as_json,
        lambda: [
            *(table for content in results.values() for table in tables_of(content)),
            *(f"{name} was not run: {reason}" for name, reason in refused.items()),
        ],
    )


@app.command()
def score(
    benchmark: Name,
    data: Annotated[Path, typer.Option(help="The benchmark's file, or a folder with it.")],
    answers: Annotated[Path, typer.Option(help='JSON lines: {"id": index, "answer": text}.')],
    images: Images = None,
    split: Split = None,
    categories: Categories = None,
    limit: Limit = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Boxes are fractions of this model's canvas, not of the image.")
    ] = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    as_json: AsJson = False,
) -> None:
    """Score answers that were made elsewhere."""
    from convllava.evaluation import score_file
    from convllava.evaluation.report import tables_of

    result = score_file(
        benchmark,
        data,
        answers,
        images=images,
        split=split,
        categories=categories or (),
        limit=limit,
        model=model,
        judge_url=judge_url,
        judge_model=judge_model,
    )
    show(result.content, as_json, lambda: tables_of(result))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A result.json, or its folder.")],
    b: Annotated[Path, typer.Argument(help="Another result of the same questions.")],
    as_json: AsJson = False,
) -> None:
    """Print how much better B is than A, with the interval of the paired difference."""
    from convllava.evaluation import compare as compare_results
    from convllava.evaluation.report import comparison_table

    found = compare_results(a, b)
    show(found, as_json, lambda: [comparison_table(found)])


@app.command()
def plot(
    results: Annotated[list[Path], typer.Argument(help="Results of one benchmark, or their folders.")],
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("eval.png"),
) -> None:
    """Plot scores against seconds to the first token."""
    from convllava.evaluation import read_result
    from convllava.evaluation.report import plot_results

    plot_results({str(path): read_result(path) for path in results}, output)
    print(output)


@app.command()
def sweep(
    output: Annotated[Path, typer.Option(help="Folder for sweep.json and sweep.png.")],
    model: Model = "tiny",
    samples: Annotated[int, typer.Option(min=1, help="Held-out pages.")] = 60,
    sides: Annotated[str, typer.Option(help="Square roots of areas, with commas.")] = "448,576,704,832,960",
    seed: Seed = 1,
    size: PageSize = 448,
    simple: Simple = False,
    as_json: AsJson = False,
) -> None:
    """Measure reading by the height of the text, at several resolutions."""
    from convllava.evaluation.report import rows_table
    from convllava.evaluation.studies import sweep as run_sweep

    report = run_sweep(model, _world(seed, size, simple), samples, squares(sides), output)
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
    """Measure how much accuracy is lost on perturbed pages and reworded questions."""
    from convllava.evaluation.report import rows_table
    from convllava.evaluation.studies import robustness as run_robustness

    report = run_robustness(model, _world(seed, size, simple), samples, output)
    columns = ("kind", "value", "accuracy", "low", "high", "lost", "lost_low", "lost_high")
    title = f"{model}: clean {report['clean']['accuracy']:.1%} of {report['clean']['n']}"
    show(report, as_json, lambda: [rows_table(title, report["rows"], columns)])


def _world(seed: int, size: int, simple: bool) -> World:
    from convllava.synthetic import World

    return World("heldout", seed=seed, size=size, simple=simple)
