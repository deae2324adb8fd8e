"""Train, and look at what a training would do and see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from convllava.cli.options import AsJson, show
from convllava.errors import InputError

RecipeFile = Annotated[Path, typer.Argument(help="A YAML file, see recipes/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. stages.dense.steps=100.")
]


def train(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints and logs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Cap every stage at so many steps.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would train, and which files are missing.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: that would train together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Train the stages of a recipe."""
    from convllava.training.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    if dry_run:
        if resume or max_steps is not None or output is not None:
            raise InputError(
                "--output, --resume and --max-steps are for a run; --dry-run plans the recipe as it stands"
            )
        _show_plan(loaded, processes, as_json)
        return
    if as_json:
        raise InputError("--json is for --dry-run; a run writes OUTPUT/log.jsonl")
    if processes > 1:
        raise InputError(
            f"--processes is for --dry-run; torchrun --nproc-per-node {processes} -m convllava train ... starts so many"
        )
    if output is None:
        raise InputError("--output is missing: name the folder for checkpoints and logs, or try --dry-run")
    run = _import_training()
    print(run(loaded, output, resume=resume, max_steps=max_steps))


def _show_plan(recipe: Any, processes: int, as_json: bool) -> None:
    from convllava.training.plan import explain_missing, plan, tables_of

    report = plan(recipe, processes)
    show(report, as_json, lambda: tables_of(report))
    if not as_json:
        print(explain_missing(report) or "no file is missing")


def _import_training() -> Any:
    try:
        from convllava.training.train import train as run
    except ImportError as error:
        raise InputError(f"training needs {error.name}; pip install 'convllava[train]'") from None
    return run


def check(
    recipe: RecipeFile,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="Folder for report.jsonl, summary.json, sizes.png.")] = Path(
        "runs/check"
    ),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Read every sample of a recipe's files, and tell what is wrong with them; an interrupted check goes on."""
    from convllava.training.check_data import check as run
    from convllava.training.check_data import table_of, verdict
    from convllava.training.recipe import Recipe

    summary = run(Recipe.load(recipe, overrides or ()), output, workers)
    show(summary, as_json, lambda: [table_of(summary)])
    if told := verdict(summary):
        raise InputError(told)


def preview(
    recipe: RecipeFile,
    stage: Annotated[str | None, typer.Option(help="By its name; the first one if not given.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many, the first that the stage sees.")] = 6,
    output: Annotated[Path, typer.Option(help="A picture.")] = Path("preview.png"),
    overrides: Overrides = None,
) -> None:
    """Draw samples as the model will see them: pixels, visual tokens, and which text is supervised."""
    from convllava.training.preview import preview as run
    from convllava.training.recipe import Recipe

    run(Recipe.load(recipe, overrides or ()), stage, samples, output)
    print(output)
