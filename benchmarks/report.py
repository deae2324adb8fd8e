"""Run a suite and write its report: JSON, tables for the terminal, pictures."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from benchmarks import SUITES, data, decoding, first_token, serving, tower, training
from benchmarks.measure import Progress, Row, Settings
from convllava import __version__
from convllava.display import ACCENT, INK, MUTED, axes_on, check_can_draw, progress_bar
from convllava.errors import InputError
from convllava.io import ResumableJsonl, make_output, write_json

PER_TOWER_AND_SIDE: dict[str, Callable[[str, int, Settings], list[Row]]] = {
    "tower": tower.tower,
    "mixed-shapes": tower.mixed_shapes,
    "training": training.training,
    "packing": training.packing,
    "frozen-features": training.frozen_features,
}
PER_SIDE: dict[str, Callable[[int, Settings], list[Row]]] = {"pixels": data.pixels, "batching": training.batching}
JOURNAL, SETTINGS = "{}.jsonl", "{}.settings.json"
"""Files of an unfinished suite: what it has measured so far, and its settings."""
WITH_PICTURE = ("scale", "first-token")
ROWS_PER_TABLE = 4
"""Rows side by side in a terminal of 80 characters."""


def run(suite: str, settings: Settings, output: Path | None = None) -> dict[str, Any]:
    """Measure one suite.

    Args:
        suite: One of `SUITES`.
        settings: What to measure and how often.
        output: Folder for SUITE.json and SUITE.png. A run that was killed continues there if its settings are the same.

    Returns:
        The machine, the settings and the rows.

    Raises:
        InputError: if the suite, a tower or the language model is unknown, a package is missing, or `output` cannot be
            a folder or holds an unfinished run with other settings.
    """
    if suite not in SUITES:
        raise InputError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES)}")
    settings.check()
    if suite in WITH_PICTURE and output is not None:
        check_can_draw("bench")
    if suite == "data" and find_spec("pyarrow") is None:
        raise InputError("the suite data needs pyarrow; pip install 'convllava[data]'")
    if output is not None:
        make_output(output)
    torch.set_num_threads(settings.threads)
    versions = {"convllava": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    described = settings.as_json() | {"versions": versions}
    journal = ResumableJsonl(output, described, JOURNAL.format(suite), SETTINGS.format(suite))
    with progress_bar(f"measuring {suite}") as progress:
        cases = _cases(suite, settings, journal, progress)
        for number, (name, measure) in enumerate(cases.items(), start=1):
            if name not in journal.entries:
                journal.add([{"id": name, "rows": measure()}])
            progress(number / len(cases))
    rows = [row for name in cases for row in journal.entries[name]["rows"]]
    capability = torch.backends.cpu.get_cpu_capability()
    report: dict[str, Any] = {
        "suite": suite,
        "machine": f"{platform.machine()}, {capability}, {settings.threads} thread(s), float32",
        "versions": versions,
        "settings": settings.as_json(),
        "rows": rows,
    }
    if suite == "scale":
        report["exponent"] = tower.exponent(rows)
    if output is not None:
        write_json(output / f"{suite}.json", report)
        for name in (JOURNAL, SETTINGS):  # the next run measures everything again
            (output / name.format(suite)).unlink(missing_ok=True)
        if suite in WITH_PICTURE:
            draw(report, output / f"{suite}.png")
    return report


def _cases(
    suite: str, settings: Settings, journal: ResumableJsonl, progress: Progress
) -> dict[str, Callable[[], list[Row]]]:
    """Return the parts of a suite by name. A run that was killed continues after its last finished part."""
    if suite in PER_TOWER_AND_SIDE:
        measure, pairs = (
            PER_TOWER_AND_SIDE[suite],
            [(name, side) for name in settings.towers for side in settings.sides],
        )
        return {f"{name} at {side}": partial(measure, name, side, settings) for name, side in pairs}
    if suite in PER_SIDE:
        return {str(side): partial(PER_SIDE[suite], side, settings) for side in settings.sides}
    if suite == "scale":
        return {f"{size.width}x{size.height}": partial(tower.scale, size, settings) for size in tower.SCALE}
    # These suites are one part each. Two of them store single times in the journal, since their works take turns.
    whole: dict[str, Callable[[], list[Row]]] = {
        "first-token": partial(first_token.first_token, settings, journal, progress),
        "serving": partial(serving.serving, settings, journal),
        "data": partial(data.data, settings),
        "decoding": partial(decoding.decoding, settings),
    }
    return {suite: whole[suite]}


def tables_of(report: dict[str, Any]) -> list[Table]:
    """Return tables for the terminal. The rows of the report are columns of the tables, a few in each table."""
    ending = f"; time grows with pixels^{report['exponent']}" if "exponent" in report else ""
    title: str | None = f"{report['suite']}: {report['machine']}{ending}"
    tables = []
    for start in range(0, len(report["rows"]), ROWS_PER_TABLE):
        rows = report["rows"][start : start + ROWS_PER_TABLE]
        table = Table(title=title if start == 0 else None, title_justify="left", show_header=False)
        for index in range(len(rows) + 1):
            table.add_column(justify="right" if index else "left")
        for key in rows[0]:
            table.add_row(key.replace("_", " "), *(_cell(row[key]) for row in rows))
        tables.append(table)
    return tables


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report of the suite `scale` or `first-token` as PNG."""
    with axes_on(path, report["machine"]) as axes:
        (_draw_scale if report["suite"] == "scale" else _draw_first_token)(axes, report)


def _draw_scale(axes: Any, report: dict[str, Any]) -> None:
    """Plot seconds and memory against megapixels on logarithmic axes."""
    rows = sorted(report["rows"], key=lambda row: row["height"] * row["width"])
    pixels = [row["height"] * row["width"] / 1e6 for row in rows]
    axes.loglog(pixels, [row["seconds"] for row in rows], "o-", color=ACCENT, label="CPU seconds")
    axes.loglog(pixels, [row["mb"] / 1000 for row in rows], "s--", color=MUTED, label="GB of memory")
    for x, row in zip(pixels, rows, strict=True):
        label, place = f"{row['width']}x{row['height']}", (x, row["seconds"])
        axes.annotate(label, place, (0, 7), textcoords="offset points", fontsize=7)
    axes.set_xlabel(f"megapixels (time grows with pixels^{report['exponent']})")
    axes.legend(frameon=False)


def _draw_first_token(axes: Any, report: dict[str, Any]) -> None:
    """Plot visual tokens against seconds to the first token; other models in grey."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    for row in report["rows"]:
        ours = row["encoder"].startswith("ConvLLaVA ")
        place = (row["first_token_seconds"], row["visual_tokens"])
        axes.loglog(*place, "o", color=ACCENT if ours else MUTED)
        label = row["encoder"].removeprefix("ConvLLaVA ").replace(" at ", " ")
        settings = {"ha": "center", "textcoords": "offset points", "fontsize": 7, "color": INK}
        axes.annotate(label, place, (0, -13) if ours else (0, 6), **settings)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks([2, 5, 10, 20, 50])
    axes.set_yticks([100, 200, 500, 1000, 2000, 4000])
    axes.set_xlabel("CPU seconds to the first token (blue: ConvLLaVA's towers by size and side)")
    axes.set_ylabel("visual tokens")
