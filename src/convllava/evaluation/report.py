"""Results as tables for the terminal and as plots."""

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
        title = f"{result['model']['name']} on {result['samples']} held-out pages"
        scores = {**result["tasks"], "overall": result["overall"]}
        shares = [(task, f"{row['accuracy']:.1%}", f"{row['blind']:.1%}", row["n"]) for task, row in scores.items()]
        table = _table(title, ("task", "accuracy", "blind", "n"), shares)
        table.caption = "blind: with another page's image"
        return table
    measures, (low, high) = result["measures"], map(_number, result["interval"])
    rows = [(name, int(row["n"]), *(row[key] for key in measures)) for name, row in result["categories"].items()]
    title = f"{result['benchmark']}: {result['primary']} {_number(result['score'])} ({low} to {high})"
    return _table(title, ("category", "n", *measures), [*rows, ("all", result["questions"], *measures.values())])


def tables_of(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield tables of a result for the terminal: its measures, its problems, and the cost of an answer."""
    yield result_table(result)
    kinds = {
        "unparsed": "could not be read and count as wrong",
        "missing": "have no answer and count as wrong",
        "unknown": "do not belong to a question",
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
    if efficiency := result.get("efficiency"):
        table = Table(title="efficiency, medians of single questions", title_justify="left", show_header=False)
        for name, value in efficiency.items():
            table.add_row(name.replace("_", " "), _number(value))
        yield table


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Return the differences B - A of `results.compare` by category and overall."""
    title = f"{comparison['benchmark']}: B - A, 95 % of bootstrap draws; A {comparison['a']}, B {comparison['b']}"
    rows = [
        (category, row["n"], row["a"], row["b"], row["difference"], *row["interval"])
        for category, row in [*comparison["categories"].items(), ("all", comparison["overall"])]
    ]
    return _table(title, ("category", "n", "A", "B", "difference", "from", "to"), rows)


def rows_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """Return some columns of plain rows as a table."""
    return _table(title, columns, [[row[name] for name in columns] for row in rows])


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> Table:
    """Return a table with names at the left and numbers at the right of their columns."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("task", "category", "kind", "value") else "right")
    for row in rows:
        table.add_row(*map(_number, row))
    return table


def _number(value: str | float | None) -> str:
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
        ends = result.get("interval") or (result["score"],) * 2
        is_pair = (
            isinstance(ends, list | tuple) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
        )
        if not is_pair:
            raise DataError(
                f"{place} has an interval that is not two numbers; give results as convllava eval writes them"
            )
        by_model[result["model"]["name"]].append({**result, "interval": ends})
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
            axes.vlines(
                seconds,
                *zip(*(result["interval"] for result in ordered), strict=True),
                color=colour,
                linewidth=1,
                alpha=0.6,
            )
            for x, y, result in zip(seconds, scores, ordered, strict=True):
                side = round(math.sqrt(result["efficiency"]["pixels"]))
                axes.annotate(str(side), (x, y), (6, -10), textcoords="offset points", fontsize=7, color=INK)
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
        axes.set(xlabel="seconds to the first token", ylabel=next(iter(results.values()))["primary"])
        axes.legend(frameon=False, fontsize=7, loc="lower right")


def plot_heights(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Plot reading accuracy against the height of the text that the tower sees, one line per resolution."""
    with axes_on(output, "held-out pages of the generated world: printed answers", _DPI) as axes:
        axes.set_prop_cycle(color=_COLOURS)
        for side in sorted({row["side"] for row in rows}):
            points = [(row["height"], row["accuracy"]) for row in rows if row["side"] == side]
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=str(side))
        label = "height of the answer's tallest character, pixels that the tower sees"
        axes.set(xlabel=label, ylabel="accuracy", ylim=(0, 1))
        if rows:
            axes.legend(frameon=False, fontsize=7, title="resolution", title_fontsize=7)


def plot_severities(clean: float, rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Plot accuracy against severity, one line per kind of perturbation; severity 0 is the unchanged page."""
    with axes_on(output, "held-out pages of the generated world, perturbed", _DPI) as axes:
        axes.set_prop_cycle(color=_COLOURS)
        for kind in dict.fromkeys(row["kind"] for row in rows):
            found = [row for row in rows if row["kind"] == kind]
            points = [(0, clean), *((row["severity"], row["accuracy"]) for row in found)]
            label = f"{kind} ({', '.join(str(row['value']) for row in found)})"
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=label)
        axes.set(xticks=range(5), xlabel="severity", ylabel="accuracy", ylim=(0, None))
        axes.legend(frameon=False, fontsize=6)
