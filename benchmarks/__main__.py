"""The command `python -m benchmarks SUITE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import SUITES
from convllava.cli import main
from convllava.cli.options import AsJson, numbers, show, squares
from convllava.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
HELP = "Measure speed and memory side by side with a baseline.\n\n\b\nSuites:\n" + "\n".join(
    f"  {name:<16} {suite.help}" for name, suite in SUITES.items()
)


@app.command(help=HELP)
def bench(
    context: typer.Context,
    suite: Annotated[str, typer.Argument(help="One of the suites above.")],
    towers: Annotated[str, typer.Option(help="tiny, T, S, B, L, separated by commas.")] = "T",
    sides: Annotated[str, typer.Option(help="Sides of square images in pixels, separated by commas.")] = "768",
    language: Annotated[str, typer.Option(help="Size of the language model: tiny, 135m, 0.5b, 7b.")] = "135m",
    peers: Annotated[bool, typer.Option("--peers", help="Measure other models or servers too.")] = False,
    vllm: Annotated[
        Path | None, typer.Option(help="Python of an environment with vLLM, to measure its server too.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Lengths of answers, separated by commas.")] = "32",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each function; the median counts.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one operation.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the report; a run that was killed continues there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    if suite not in SUITES:
        raise InputError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES)}")
    used = SUITES[suite].options
    for name in sorted(frozenset().union(*(other.options for other in SUITES.values())) - used):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            takes = ", ".join(f"`{option}`" for option in sorted({*used, "repeats"}))
            raise InputError(f"`{name}` has no effect on {suite}, which takes {takes}")
    for name in ("towers", "sides"):
        if suite == "serving" and "," in str(context.params[name]):
            raise InputError(f"serving measures one model; give `{name}` one value")
    from benchmarks.measure import Settings
    from benchmarks.report import run, tables_of

    settings = Settings(
        towers.split(","), squares(sides), language, peers, vllm, numbers("--tokens", tokens), repeats, threads
    )
    report = run(suite, settings, output)
    show(report, as_json, lambda: tables_of(report))


if __name__ == "__main__":
    main(app)
