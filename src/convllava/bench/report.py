"""Runs a suite, shows progress, and writes what it found as JSON, as a table and as a picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from convllava import __version__
from convllava.bench import decoding, serving, suites
from convllava.bench.batches import batches
from convllava.bench.features import features
from convllava.bench.reading import reading
from convllava.bench.steps import steps
from convllava.errors import InputError
from convllava.files import make_output
from convllava.geometry import Size
from convllava.inspection import language_models, towers

SCALE = (Size(512, 512), Size(1024, 1024), Size(2048, 2048), Size(4096, 4096), Size(8192, 8192), Size(16384, 4096))
SUITES = (
    "tower",
    "training",
    "steps",
    "batches",
    "mixed",
    "scale",
    "first-token",
    "pixels",
    "decoding",
    "serving",
    "data",
)
DRAWN = ("scale", "first-token")
"""Suites of which there is a picture."""


def run(
    suite: str,
    names: Sequence[str],
    sides: Sequence[str],
    language: str,
    peers: bool,
    repeats: int,
    threads: int,
    output: Path | None,
) -> dict[str, Any]:
    """Measure one suite.

    Args:
        suite: One of `SUITES`.
        names: Towers of the family.
        sides: Of square images, in pixels.
        language: Shape of the language model whose prefill follows the tower.
        peers: Whether encoders of other models are measured too.
        repeats: Measurements of each, taken in turns; the median counts.
        threads: Of one operation.
        output: Folder for SUITE.json and SUITE.png.

    Returns:
        The machine, the settings and the rows.

    Raises:
        InputError: an unknown suite, tower, language model or side; a folder that cannot be, or no matplotlib to draw
            with.
    """
    if output is not None:
        _prepare(output, suite)
    measured = _rows(suite, names, _checked(names, sides, language), language, peers, repeats)
    torch.set_num_threads(threads)
    console, rows = Console(stderr=True), []
    with console.status(f"measuring {suite}"):
        for row in measured:
            rows.append(row)
            console.print(", ".join(f"{key} {value}" for key, value in row.items()), highlight=False)
    report = {
        "suite": suite,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread(s), float32",
        "versions": {"convllava": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "repeats": repeats,
        "rows": rows,
    }
    if suite == "scale":
        report["exponent"] = suites.exponent(rows)
    if output is not None:
        _write(report, output)
    return report


def _rows(
    suite: str, names: Sequence[str], sides: list[int], language: str, peers: bool, repeats: int
) -> Iterator[suites.Row]:
    known: dict[str, Callable[[], Iterator[suites.Row]]] = {
        "tower": lambda: suites.tower(names, sides, repeats),
        "training": lambda: suites.training(names, sides, repeats),
        "steps": lambda: steps(names, sides, repeats, language),
        "batches": lambda: batches(sides, repeats),
        "features": lambda: features(names, sides, repeats, language),
        "mixed": lambda: suites.mixed(names, sides, repeats),
        "scale": lambda: suites.scale(SCALE),
        "first-token": lambda: suites.first_token(names, sides, repeats, language, peers),
        "pixels": lambda: suites.pixels(sides, repeats),
        "data": lambda: reading(repeats),
        "decoding": lambda: decoding.decoding(language, repeats),
        "serving": lambda: serving.serving(names[0], language, sides[0], repeats, peers),
    }
    if suite not in known:
        raise InputError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES)}")
    return known[suite]()


def _checked(names: Sequence[str], sides: Sequence[str], language: str) -> list[int]:
    for name in names:
        if name not in towers():
            raise InputError(f"there is no tower {name!r}; choose of {', '.join(towers())}")
    if language not in language_models():
        raise InputError(f"there is no language model {language!r}; choose one of {', '.join(language_models())}")
    return parse_sides(sides)


def parse_sides(sides: Sequence[str]) -> list[int]:
    """Sides of squares in pixels, as the command line has them; InputError for what is no multiple of 64."""
    if not all(side.isdecimal() and int(side) and int(side) % 64 == 0 for side in sides):
        raise InputError(f"--sides {','.join(sides)}: give multiples of 64, separated by commas")
    return [int(side) for side in sides]


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
