"""Runs a suite, shows progress, and writes what it found as JSON, as a table and as a picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from convllava import __version__
from convllava.bench import decoding, serving, suites
from convllava.bench.reading import reading
from convllava.bench.settings import Settings
from convllava.bench.steps import steps
from convllava.errors import InputError
from convllava.files import make_output
from convllava.geometry import Size

SCALE = (Size(512, 512), Size(1024, 1024), Size(2048, 2048), Size(4096, 4096), Size(8192, 8192), Size(16384, 4096))
SUITES = ("tower", "training", "steps", "mixed", "scale", "first-token", "pixels", "decoding", "serving", "data")
DRAWN = ("scale", "first-token")
"""Suites of which there is a picture."""


def run(suite: str, settings: Settings, output: Path | None = None) -> dict[str, Any]:
    """Measure one suite.

    Args:
        suite: One of `SUITES`.
        output: Folder for SUITE.json and SUITE.png.

    Returns:
        The machine, the settings and the rows.

    Raises:
        InputError: an unknown suite, tower or language model; a folder that cannot be, or no matplotlib to draw with.
    """
    if output is not None:
        _prepare(output, suite)
    measured = _rows(suite, settings)
    torch.set_num_threads(settings.threads)
    console, rows = Console(stderr=True), []
    with console.status(f"measuring {suite}"):
        for row in measured:
            rows.append(row)
            console.print(", ".join(f"{key} {value}" for key, value in row.items()), highlight=False)
    capability = torch.backends.cpu.get_cpu_capability()
    report = {
        "suite": suite,
        "machine": f"{platform.machine()}, {capability}, {settings.threads} thread(s), float32",
        "versions": {"convllava": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "repeats": settings.repeats,
        "rows": rows,
    }
    if suite == "scale":
        report["exponent"] = suites.exponent(rows)
    if output is not None:
        _write(report, output)
    return report


def _rows(suite: str, settings: Settings) -> Iterator[suites.Row]:
    settings.check()
    names, sides, language, repeats = settings.towers, settings.sides, settings.language, settings.repeats
    known: dict[str, Callable[[], Iterator[suites.Row]]] = {
        "tower": lambda: suites.tower(names, sides, repeats),
        "training": lambda: suites.training(names, sides, repeats),
        "steps": lambda: steps(names, sides, repeats, language),
        "mixed": lambda: suites.mixed(names, sides, repeats),
        "scale": lambda: suites.scale(SCALE),
        "first-token": lambda: suites.first_token(names, sides, repeats, language, settings.peers),
        "pixels": lambda: suites.pixels(sides, repeats),
        "data": lambda: reading(repeats),
        "decoding": lambda: decoding.decoding(language, repeats),
        "serving": lambda: serving.serving(settings),
    }
    if suite not in known:
        raise InputError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES)}")
    return known[suite]()


def table_of(report: dict[str, Any]) -> Table:
    """The rows for the terminal, a column each."""
    rows = report["rows"]
    ending = f"; time grows with pixels^{report['exponent']}" if "exponent" in report else ""
    table = Table(title=f"{report['suite']}: {report['machine']}{ending}", title_justify="left", show_header=False)
    for index in range(len(rows) + 1):
        table.add_column(justify="right" if index else "left")
    for key in rows[0]:
        table.add_row(key.replace("_", " "), *(_cell(row[key]) for row in rows))
    return table


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _prepare(output: Path, suite: str) -> None:
    """Refuse before a measurement what would fail after it."""
    if suite in DRAWN and find_spec("matplotlib") is None:
        raise InputError("drawing needs matplotlib; pip install 'convllava[bench]', or leave out --output")
    make_output(output)


def _write(report: dict[str, Any], output: Path) -> None:
    path = output / f"{report['suite']}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    if report["suite"] in DRAWN:
        from convllava.bench.plot import draw

        draw(report, output / f"{report['suite']}.png")
