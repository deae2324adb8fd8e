"""Results as tables for the terminal and as plots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from convllava.display import ACCENT, INK, MUTED, axes_on
from convllava.errors import DataError

_MOST_IDS = 8
"""Ids that a line lists; the JSON has all of them."""
_DPI = 110
"""Keeps a picture below 100 kB."""
_COLOURS = (ACCENT, "#d1495b", "#2a9d6f", "#e09f3e", "#7b5ea7", "#3d8ea8", MUTED)
_MARKER_AREA = 12.0
"""Square points of the marker of a tower with a million parameters; it grows with the root of the parameters."""


def result_table(result: Mapping[str, Any]) -> Table:
    """Return the measures of a result by category and overall; of generated pages, accuracy and blind by task."""
    if "tasks" in result:
        name, samples = result["model"]["name"], result["samples"]
        rows = [*result["tasks"].items(), ("overall", result["overall"])]
        table = _table(f"{name} on {samples} held-out pages", "task", "accuracy", "blind", "n")
        table.caption = "blind: with another page's image"
        for task, score in rows:
            table.add_row(task, f"{score['accuracy']:.1%}", f"{score['blind']:.1%}", str(score["n"]))
        return table
    names = list(result["measures"])
    low, high = result["interval"]
    title = f"{result['benchmark']}: {result['primary']} {_number(result['score'])} ({_number(low)} to {_number(high)})"
    table = _table(title, "category", "n", *names)
    for category, measures in result["categories"].items():
        table.add_row(category, str(int(measures["n"])), *(_number(measures[name]) for name in names))
    table.add_row("all", str(result["questions"]), *(_number(result["measures"][name]) for name in names))
    return table


def tables_of(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """Return everything about a result for the terminal: its table, what went wrong, and what an answer costs."""
    yield result_table(result)
    yield from problems(result)
    if efficiency := result.get("efficiency"):
        table = Table(title="efficiency, medians of single questions", title_justify="left", show_header=False)
        for name, value in efficiency.items():
            table.add_row(name.replace("_", " "), value if isinstance(value, str) else _number(value))
        yield table


def problems(result: Mapping[str, Any]) -> Iterator[str]:
    """Return a line for each kind of problem, such as answers that could not be read: how many, and which."""
    kinds = {
        "unparsed": "could not be read and count as wrong",
        "missing": "have no answer and count as wrong",
        "unknown": "are ids of no question",
        "absent": "have no questions and add nothing to the sum",
    }
    for kind, meaning in kinds.items():
        if found := result[kind]:
            more = ", ..." if len(found) > _MOST_IDS else ""
            yield f"{kind}: {len(found)} {meaning}: {', '.join(found[:_MOST_IDS])}{more}"
    for item in result["broken"][:_MOST_IDS]:
        yield f"broken: {item['id']} counts as wrong: {item['reason']}"
    if len(result["broken"]) > _MOST_IDS:
        yield f"broken: {len(result['broken'])} in all"


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Return the differences B - A of `results.compare` by category and overall."""
    title = f"{comparison['benchmark']}: B - A, 95 % of bootstrap draws; A {comparison['a']}, B {comparison['b']}"
    table = _table(title, "category", "n", "A", "B", "difference", "from", "to")
    for category, row in [*comparison["categories"].items(), ("all", comparison["overall"])]:
        numbers = (row["a"], row["b"], row["difference"], *row["interval"])
        table.add_row(category, str(row["n"]), *(_number(value) for value in numbers))
    return table


def rows_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """Return some columns of plain rows as a table."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("kind", "value") else "right")
    for row in rows:
        table.add_row(*(row[name] if isinstance(row[name], str) else _number(row[name]) for name in columns))
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_results(results: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Plot score against seconds to the first token, on a logarithmic axis.

    The marker's size shows the tower's parameters and its label the resolution, the square root of the pixels that
    the tower sees; vertical lines show the score's interval. Results of one model are joined by a line.

    Args:
        results: `Result`s of one benchmark by name; messages use the names.
        output: The PNG to write.

    Raises:
        DataError: if a result has no efficiency or is malformed, or if they are of different benchmarks.
    """

    def interval(result: Mapping[str, Any]) -> Sequence[float]:
        return result.get("interval") or (result["score"],) * 2

    wanted: dict[tuple[str, ...], Any] = {
        ("primary",): str,
        ("model", "name"): str,
        ("model", "parameters", "tower"): int,
        ("efficiency", "seconds_to_first_token"): int | float,
        ("efficiency", "pixels"): int | float,
    }
    by_model: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for place, result in results.items():
        if not (result.get("efficiency") or {}).get("seconds_to_first_token"):
            raise DataError(f"{place} has no time to the first token; run the evaluation with `timed` above 0")
        for keys, kind in wanted.items():
            value: Any = result
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if not isinstance(value, kind):
                raise DataError(f"{place} lacks {'.'.join(keys)}; give results as convllava eval writes them")
        ends = interval(result)
        if (
            not isinstance(ends, list | tuple)
            or len(ends) != 2
            or not all(isinstance(end, int | float) for end in ends)
        ):
            raise DataError(
                f"{place} has an interval that is not two numbers; give results as convllava eval writes them"
            )
        by_model[result["model"]["name"]].append(result)
    names = sorted({result["benchmark"] for result in results.values()})
    if len(names) > 1:
        raise DataError(f"the results are of {', '.join(names)}; plot one benchmark at a time")

    with axes_on(output, f"{names[0]}; marker: parameters of the tower; label: resolution", _DPI) as axes:
        for number, (name, found) in enumerate(by_model.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            ordered = sorted(found, key=lambda result: result["efficiency"]["seconds_to_first_token"])
            seconds = [result["efficiency"]["seconds_to_first_token"] for result in ordered]
            scores = [result["score"] for result in ordered]
            areas = [_MARKER_AREA * math.sqrt(result["model"]["parameters"]["tower"] / 1e6) for result in ordered]
            axes.plot(seconds, scores, color=colour, linewidth=1, alpha=0.6)
            axes.scatter(seconds, scores, areas, color=colour, label=name)
            axes.vlines(seconds, *zip(*map(interval, ordered), strict=True), color=colour, linewidth=1, alpha=0.6)
            for x, y, result in zip(seconds, scores, ordered, strict=True):
                side = round(math.sqrt(result["efficiency"]["pixels"]))
                axes.annotate(str(side), (x, y), (6, -10), textcoords="offset points", fontsize=7, color=INK)
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
        axes.set_xlabel("seconds to the first token")
        axes.set_ylabel(next(iter(results.values()))["primary"])
        axes.legend(frameon=False, fontsize=7, loc="lower right")


def plot_heights(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Plot reading accuracy against the height of the text that the tower sees, one line per resolution."""
    by_side: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_side[row["side"]].append(row)
    with axes_on(output, "held-out pages of the generated world: printed answers", _DPI) as axes:
        for number, (side, found) in enumerate(sorted(by_side.items())):
            heights = [row["height"] for row in found]
            accuracies = [row["accuracy"] for row in found]
            axes.plot(heights, accuracies, "o-", color=_COLOURS[number % len(_COLOURS)], markersize=4, label=str(side))
        axes.set_xlabel("height of the answer's tallest character, pixels that the tower sees")
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 1)
        if by_side:
            axes.legend(frameon=False, fontsize=7, title="resolution", title_fontsize=7)


def plot_severities(clean: float, rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Plot accuracy against severity, one line per kind of perturbation; severity 0 is the unchanged page."""
    by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    with axes_on(output, "held-out pages of the generated world, perturbed", _DPI) as axes:
        for number, (kind, found) in enumerate(by_kind.items()):
            severities = [0, *(row["severity"] for row in found)]
            accuracies = [clean, *(row["accuracy"] for row in found)]
            values = ", ".join(str(row["value"]) for row in found)
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(severities, accuracies, "o-", color=colour, markersize=4, label=f"{kind} ({values})")
        axes.set_xticks(range(5))
        axes.set_xlabel("severity")
        axes.set_ylabel("accuracy")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=6)
