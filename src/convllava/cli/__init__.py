"""The command line: one thin function per command, each calling one function that Python users call too."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from convllava import __version__
from convllava.cli.ask import ask, demo
from convllava.cli.chat import chat
from convllava.cli.eval import app as eval_app
from convllava.cli.models import convert, export, info, merge
from convllava.cli.serve import serve
from convllava.cli.train import check, preview, train
from convllava.errors import InputError

app = typer.Typer(
    name="convllava",
    help="Ask questions about images, and train the models that answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at the data of a recipe before training.", no_args_is_help=True)

for command in (ask, chat, demo, train, serve, info, convert, merge, export):
    app.command()(command)
data.command()(check)
data.command()(preview)
app.add_typer(data, name="data")
app.add_typer(eval_app, name="eval")


def main(command: typer.Typer = app) -> None:
    """Run a command line; bad input is one line on stderr and exit code 2."""
    # Bars for loading a file are noise around an answer; our own commands show their own progress.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        command()
    except InputError as error:
        print(f"convllava: {with_options(str(error), command, sys.argv[1:])}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def with_options(message: str, command: typer.Typer, arguments: Sequence[str]) -> str:
    """Replace the arguments that a message names in backquotes by the options of the command that was called."""
    called: Any = typer.main.get_command(command)
    names: dict[str, str] = {}
    for word in ["", *arguments]:
        called = getattr(called, "commands", {}).get(word, called)
        default = getattr(called, "commands", {}).get(getattr(called, "default", None), called)
        names |= {option.name: option.opts[0] for option in default.params if option.name and option.opts}
    return re.sub("`([a-z_]+)`", lambda found: names.get(found[1], found[0]), message)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass
