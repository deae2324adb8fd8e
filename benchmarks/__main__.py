"""Measure speed and memory next to a named baseline: `python -m benchmarks tower`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convllava.cli import main
from convllava.cli.options import AsJson, is_given, numbers, show, squares
from convllava.errors import InputError

_TOWERS = {"towers", "sides", "repeats"}
_USED = {
    "tower": _TOWERS,
    "training": _TOWERS,
    "mixed": _TOWERS,
    "steps": {*_TOWERS, "language"},
    "features": {*_TOWERS, "language"},
    "batches": {"sides", "repeats"},
    "scale": {"repeats"},
    "first-token": {*_TOWERS, "language", "peers"},
    "pixels": {"sides", "repeats"},
    "decoding": {"language", "repeats"},
    "serving": {*_TOWERS, "language", "peers", "vllm", "tokens"},
    "data": {"repeats"},
}
"""Options that mean something to a suite, beside those that do to all."""


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Argument(
            help="tower, training, steps, batches, features, mixed, scale, first-token, pixels, decoding, "
            "serving or data."
        ),
    ],
    towers: Annotated[str, typer.Option(help="Of tiny, T, S, B, L, separated by commas.")] = "T",
    sides: Annotated[str, typer.Option(help="Of square images, separated by commas.")] = "768",
    language: Annotated[str, typer.Option(help="Shape of the language model: tiny, 135m, 0.5b, 7b.")] = "135m",
    peers: Annotated[bool, typer.Option("--peers", help="first-token, serving: what others do, too.")] = False,
    vllm: Annotated[
        Path | None, typer.Option(help="serving: the python of an environment with vLLM, whose server is measured too.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="serving: lengths of answers, separated by commas.")] = "32",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each, taken in turns.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of one operation.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Folder for its files, and for what a killed run has measured.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory side by side with a baseline."""
    _refuse_unused(context, suite)
    from benchmarks.report import run, tables_of
    from benchmarks.settings import Settings

    settings = Settings(
        towers.split(","), squares(sides), language, peers, vllm, numbers("--tokens", tokens), repeats, threads
    )
    report = run(suite, settings, output)
    show(report, as_json, lambda: tables_of(report))


def _refuse_unused(context: typer.Context, suite: str) -> None:
    used = _USED.get(suite, set().union(*_USED.values()))  # an unknown suite is told by itself
    for name in sorted(set().union(*_USED.values()) - used):
        if is_given(context, name):
            raise InputError(
                f"--{name} means nothing to {suite}, which takes {', '.join(f'--{n}' for n in sorted(used))}"
            )
    for name in ("towers", "sides"):
        if suite == "serving" and "," in str(context.params[name]):
            raise InputError(f"serving measures one model; give --{name} one value")


if __name__ == "__main__":
    main(app)
