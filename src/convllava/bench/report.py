"""Runs a suite, shows progress, and writes what it found as JSON, as a table and as a picture."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from convllava import __version__
from convllava.bench import decoding, serving, suites
from convllava.bench.batches import batches
from convllava.bench.features import features
from convllava.bench.reading import reading
from convllava.bench.steps import steps
from convllava.bench.timing import Progress
from convllava.errors import InputError
from convllava.files import make_output, write_json
from convllava.geometry import Size
from convllava.inspection import language_models, towers
from convllava.journal import Journal
from convllava.progress import progress_bar

SCALE = (Size(512, 512), Size(1024, 1024), Size(2048, 2048), Size(4096, 4096), Size(8192, 8192), Size(16384, 4096))
SUITES = (
    "tower",
    "training",
    "steps",
    "batches",
    "features",
    "mixed",
    "scale",
    "first-token",
    "pixels",
    "decoding",
    "serving",
    "data",
)
Case = Callable[[Progress], Iterator[suites.Row]]
"""Measures some rows, and tells the share that is done where it takes long."""
_BY_TOWER = {"tower": suites.tower, "training": suites.training, "mixed": suites.mixed}
"""Suites that are measured for one tower and one side after the other."""
_BY_STEP = {"steps": steps, "features": features}
"""And those that train a language model with them."""
_JOURNAL, _SETTINGS = "{}.jsonl", "{}.settings.json"
"""What a suite has measured so far, and how."""
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
        output: Folder for SUITE.json and SUITE.png, and for what a run that is killed has measured: the same command
            continues it.

    Returns:
        The machine, the settings and the rows.

    Raises:
        InputError: an unknown suite, tower, language model or side; a folder that cannot be, or that holds the
            beginnings of a run with other settings; or no matplotlib to draw with.
    """
    settings = {
        "towers": list(names),
        "sides": _checked(suite, names, sides, language),
        "language": language,
        "peers": peers,
        "repeats": repeats,
        "threads": threads,
        "versions": {"convllava": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if output is not None:
        _prepare(output, suite)
    torch.set_num_threads(threads)
    journal = Journal(output, settings, _JOURNAL.format(suite), _SETTINGS.format(suite))
    rows = _measured(suite, journal, _cases(suite, settings, journal))
    report = {
        "suite": suite,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread(s), float32",
        "versions": settings["versions"],
        "repeats": repeats,
        "rows": rows,
    }
    if suite == "scale":
        report["exponent"] = suites.exponent(rows)
    if output is not None:
        _write(report, output)
    return report


def _measured(suite: str, journal: Journal, cases: Mapping[str, Case]) -> list[suites.Row]:
    """The rows of all cases in their order; those of a run that was killed are not measured again."""
    with progress_bar(f"measuring {suite}") as progress:
        for number, (name, measure) in enumerate(cases.items()):
            if name not in journal.entries:
                share = partial(_within, progress, number, len(cases))
                journal.add([{"id": name, "rows": list(measure(share))}])
            progress((number + 1) / len(cases))
    return [row for name in cases for row in journal.entries[name]["rows"]]


def _within(progress: Progress, number: int, cases: int, share: float) -> None:
    progress((number + share) / cases)


def _cases(suite: str, settings: Mapping[str, Any], journal: Journal) -> dict[str, Case]:
    """What a suite measures, in the parts that a killed run keeps, by their names."""
    names, sides, repeats = settings["towers"], settings["sides"], settings["repeats"]
    language, peers = settings["language"], settings["peers"]
    if suite in _BY_TOWER:
        measure = _BY_TOWER[suite]
        pairs = [(name, side) for name in names for side in sides]
        return {f"{name} at {side}": _plain(measure, [name], [side], repeats) for name, side in pairs}
    if suite in _BY_STEP:
        measure = _BY_STEP[suite]
        pairs = [(name, side) for name in names for side in sides]
        return {f"{name} at {side}": _plain(measure, [name], [side], repeats, language) for name, side in pairs}
    if suite == "scale":
        return {f"{size.width}x{size.height}": _plain(suites.scale, [size]) for size in SCALE}
    if suite == "pixels":
        return {str(side): _plain(suites.pixels, [side], repeats) for side in sides}
    whole: dict[str, Case] = {
        "batches": _plain(batches, sides, repeats),
        "first-token": lambda share: suites.first_token(names, sides, repeats, language, peers, journal, share),
        "data": _plain(reading, repeats),
        "decoding": _plain(decoding.decoding, language, repeats),
        "serving": _plain(serving.serving, names[0], language, sides[0], repeats, peers),
    }
    return {suite: whole[suite]}


def _plain(measure: Callable[..., Iterator[suites.Row]], *arguments: Any) -> Case:
    return lambda share: measure(*arguments)


def _checked(suite: str, names: Sequence[str], sides: Sequence[str], language: str) -> list[int]:
    if suite not in SUITES:
        raise InputError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES)}")
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
    write_json(output / f"{report['suite']}.json", report)
    for left in (_JOURNAL, _SETTINGS):  # what is finished is measured anew the next time
        (output / left.format(report["suite"])).unlink(missing_ok=True)
    if report["suite"] in DRAWN:
        from convllava.bench.plot import draw

        draw(report, output / f"{report['suite']}.png")
