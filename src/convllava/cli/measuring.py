"""Measure speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convllava.cli.options import AsJson, numbers, show, squares


def bench(
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
    output: Annotated[Path | None, typer.Option(help="Folder for its files; continued after a kill.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory side by side with a baseline."""
    from convllava.bench.report import run, table_of
    from convllava.bench.settings import Settings

    settings = Settings(
        towers.split(","), squares(sides), language, peers, vllm, numbers("--tokens", tokens), repeats, threads
    )
    report = run(suite, settings, output)
    show(report, as_json, lambda: [table_of(report)])
