"""The command line: one thin function per command, each calling one function that Python users call too."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from convllava import __version__
from convllava.cli import evaluating
from convllava.cli.answering import ask, chat, demo
from convllava.cli.measuring import bench
from convllava.cli.models import convert, export, info, merge
from convllava.cli.serving import serve
from convllava.cli.training import check, preview, train
from convllava.errors import InputError

app = typer.Typer(
    name="convllava",
    help="Ask pictures, and train the models that answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at the data of a recipe before it trains.", no_args_is_help=True)

app.command()(ask)
app.command()(chat)
app.command()(demo)
app.command()(train)
app.add_typer(data, name="data")
data.command()(check)
data.command()(preview)
app.add_typer(evaluating.app, name="eval")
app.command()(serve)
app.command()(info)
app.command()(convert)
app.command()(merge)
app.command()(export)
app.command()(bench)


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
