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

from benchmarks import decoding, serving, suites
from benchmarks.batches import batches
from benchmarks.features import features
from benchmarks.reading import reading
from benchmarks.settings import Settings
from benchmarks.steps import steps
from benchmarks.timing import Progress
from convllava import __version__
from convllava.display import check_can_draw, progress_bar
from convllava.errors import InputError
from convllava.geometry import Size
from convllava.io import ResumableJsonl, make_output, write_json

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
_BY_TOWER: dict[str, Callable[..., Iterator[suites.Row]]] = {
    "tower": suites.tower,
    "training": suites.training,
    "mixed": suites.mixed,
    "steps": steps,
    "features": features,
}
"""Suites that are measured for one tower and one side after the other."""
_WITH_LANGUAGE = ("steps", "features")
"""Those of them that train a language model too."""
_BY_SIDE: dict[str, Callable[..., Iterator[suites.Row]]] = {"pixels": suites.pixels, "batches": batches}
_JOURNAL, _SETTINGS = "{}.jsonl", "{}.settings.json"
"""What a suite has measured so far, and how."""
_COLUMNS = 4
"""Rows side by side in a terminal of 80 characters."""
DRAWN = ("scale", "first-token")
"""Suites of which there is a picture."""


def run(suite: str, settings: Settings, output: Path | None = None) -> dict[str, Any]:
    """Measure one suite.

    Args:
        suite: One of `SUITES`.
        settings: What is measured, and how.
        output: Folder for SUITE.json and SUITE.png, and for what a run that is killed has measured: the same command
            continues it.

    Returns:
        The machine, the settings and the rows.

    Raises:
        InputError: an unknown suite, tower or language model; a folder that cannot be, or that holds the beginnings of
            a run with other settings; or no matplotlib to draw with.
    """
    if suite not in SUITES:
        raise InputError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES)}")
    settings.check()
    _check_packages(suite, output)
    if output is not None:
        make_output(output)
    torch.set_num_threads(settings.threads)
    versions = {"convllava": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    described = settings.as_json() | {"versions": versions}
    journal = ResumableJsonl(output, described, _JOURNAL.format(suite), _SETTINGS.format(suite))
    rows = _measured(suite, journal, _cases(suite, settings, journal))
    capability = torch.backends.cpu.get_cpu_capability()
    report: dict[str, Any] = {
        "suite": suite,
        "machine": f"{platform.machine()}, {capability}, {settings.threads} thread(s), float32",
        "versions": versions,
        "settings": settings.as_json(),
        "rows": rows,
    }
    if suite == "scale":
        report["exponent"] = suites.exponent(rows)
    if output is not None:
        _write(report, output)
    return report


def _measured(suite: str, journal: ResumableJsonl, cases: Mapping[str, Case]) -> list[suites.Row]:
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


def _cases(suite: str, settings: Settings, journal: ResumableJsonl) -> dict[str, Case]:
    """What a suite measures, in the parts that a killed run keeps, by their names."""
    names, sides, repeats = settings.towers, settings.sides, settings.repeats
    if suite in _BY_TOWER:
        measure, rest = _BY_TOWER[suite], (settings.language,) if suite in _WITH_LANGUAGE else ()
        pairs = [(name, side) for name in names for side in sides]
        return {f"{name} at {side}": _plain(measure, [name], [side], repeats, *rest) for name, side in pairs}
    if suite == "scale":
        return {f"{size.width}x{size.height}": _plain(suites.scale, [size], repeats) for size in SCALE}
    if suite in _BY_SIDE:
        return {str(side): _plain(_BY_SIDE[suite], [side], repeats) for side in sides}
    whole: dict[str, Case] = {
        "first-token": lambda share: suites.first_token(
            names, sides, repeats, settings.language, settings.peers, journal, share
        ),
        "data": _plain(reading, repeats),
        "decoding": _plain(decoding.decoding, settings.language, repeats),
        "serving": _plain(serving.serving, settings, journal),
    }
    return {suite: whole[suite]}


def _plain(measure: Callable[..., Iterator[suites.Row]], *arguments: Any) -> Case:
    return lambda share: measure(*arguments)


def tables_of(report: dict[str, Any]) -> list[Table]:
    """The rows for the terminal, a column each, and as many tables as it takes for columns to be read."""
    ending = f"; time grows with pixels^{report['exponent']}" if "exponent" in report else ""
    title = f"{report['suite']}: {report['machine']}{ending}"
    starts = range(0, len(report["rows"]), _COLUMNS)
    return [_table(report["rows"][start : start + _COLUMNS], None if start else title) for start in starts]


def _table(rows: Sequence[suites.Row], title: str | None) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for index in range(len(rows) + 1):
        table.add_column(justify="right" if index else "left")
    for key in rows[0]:
        table.add_row(key.replace("_", " "), *(_cell(row[key]) for row in rows))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,}"


def _check_packages(suite: str, output: Path | None) -> None:
    """Refuse before a measurement what would fail after it."""
    if suite in DRAWN and output is not None:
        check_can_draw("bench")
    if suite == "data" and find_spec("pyarrow") is None:
        raise InputError("bench data needs pyarrow; pip install 'convllava[data]'")


def _write(report: dict[str, Any], output: Path) -> None:
    write_json(output / f"{report['suite']}.json", report)
    for left in (_JOURNAL, _SETTINGS):  # what is finished is measured anew the next time
        (output / left.format(report["suite"])).unlink(missing_ok=True)
    if report["suite"] in DRAWN:
        from benchmarks.plot import draw

        draw(report, output / f"{report['suite']}.png")
