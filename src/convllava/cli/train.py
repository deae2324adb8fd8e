"""The commands `train`, `data check` and `data preview`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from convllava.cli.options import AsJson, show
from convllava.errors import ConfigError, DataError

RecipeFile = Annotated[Path, typer.Argument(help="A YAML file, see recipes/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting, e.g. stages.dense.steps=100.")
]


def train(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints and logs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Most steps of each stage.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained and what is missing.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: how many train together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Train the stages of a recipe."""
    from convllava.training.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    if dry_run:
        if resume or max_steps is not None or output is not None:
            raise ConfigError("--output, --resume and --max-steps have no effect with --dry-run; leave them out")
        from convllava.training.plan import explain_missing, plan, tables_of

        report = plan(loaded, processes)
        show(report, as_json, lambda: tables_of(report))
        if not as_json:
            print(explain_missing(report) or "no file is missing")
        return
    if as_json:
        raise ConfigError("--json needs --dry-run; a run writes OUTPUT/log.jsonl")
    if processes > 1:
        raise ConfigError(
            "--processes needs --dry-run; start a run in several processes with "
            f"torchrun --nproc-per-node {processes} -m convllava train ..."
        )
    if output is None:
        raise ConfigError("--output is missing: name the folder for checkpoints and logs, or try --dry-run")
    try:
        from convllava.training.train import train as run
    except ImportError as error:
        raise ConfigError(f"training needs {error.name}; pip install 'convllava[train]'") from None
    print(run(loaded, output, resume=resume, max_steps=max_steps))


def check(
    recipe: RecipeFile,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="Folder for report.jsonl and sizes.png.")] = Path("runs/check"),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Read every sample of a recipe's files and report problems; an interrupted check continues."""
    from convllava.training.check_data import check as run
    from convllava.training.check_data import table_of, verdict
    from convllava.training.recipe import Recipe

    summary = run(Recipe.load(recipe, overrides or ()), output, workers)
    show(summary, as_json, lambda: [table_of(summary)])
    if reason := verdict(summary):
        raise DataError(reason)


def preview(
    recipe: RecipeFile,
    stage: Annotated[str | None, typer.Option(help="Name of the stage; default: the first.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples, from the first one on.")] = 6,
    output: Annotated[Path, typer.Option(help="Path of the picture.")] = Path("preview.png"),
    overrides: Overrides = None,
) -> None:
    """Draw samples as the model will see them: pixels, visual tokens, and which text is supervised."""
    from convllava.training.preview import preview as run
    from convllava.training.recipe import Recipe

    run(Recipe.load(recipe, overrides or ()), stage, samples, output)
    print(output)
