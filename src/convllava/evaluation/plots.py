"""Pictures of results."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convllava.display import ACCENT, INK, MUTED, axes_on
from convllava.errors import InputError
from convllava.evaluation.compare import read_result

_DPI = 110
"""Keeps a picture below 100 kB."""
_COLOURS = (ACCENT, "#d1495b", "#2a9d6f", "#e09f3e", "#7b5ea7", "#3d8ea8", MUTED)
_WANTED: dict[tuple[str, ...], Any] = {
    ("primary",): str,
    ("model", "name"): str,
    ("model", "parameters", "tower"): int,
    ("efficiency", "seconds_to_first_token"): int | float,
    ("efficiency", "pixels"): int | float,
}
"""What is drawn of a result beside its score."""
_AREA = 12.0
"""Square points of a marker for a tower of a million parameters; the area grows with the root of the parameters."""


def plot_results(paths: Sequence[Path], output: Path) -> None:
    """Score against seconds to the first token, on a logarithmic axis.

    A marker's size tells the tower's parameters and its label the resolution, the square root of the pixels that the
    tower sees; its whiskers are the score's interval. Results of one model are joined by a line.

    Raises:
        InputError: a result has no efficiency or is malformed, or they are of different benchmarks.
    """
    results = [_timed(read_result(path), path) for path in paths]
    if len({result["benchmark"] for result in results}) > 1:
        names = ", ".join(sorted({result["benchmark"] for result in results}))
        raise InputError(f"the results are of {names}; draw one benchmark at a time")
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_model[result["model"]["name"]].append(result)
    with axes_on(
        output, f"{results[0]['benchmark']}; marker: parameters of the tower; label: resolution", _DPI
    ) as axes:
        for place, (name, found) in enumerate(by_model.items()):
            _curve(axes, name, found, _COLOURS[place % len(_COLOURS)])
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
        axes.set_xlabel("seconds to the first token")
        axes.set_ylabel(results[0]["primary"])
        axes.legend(frameon=False, fontsize=7, loc="lower right")


def _timed(result: dict[str, Any], path: Path) -> dict[str, Any]:
    if not (result.get("efficiency") or {}).get("seconds_to_first_token"):
        raise InputError(f"{path} has no time to the first token; run convllava eval without --timed 0")
    for keys, kind in _WANTED.items():
        value: Any = result
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise InputError(f"{path} lacks {'.'.join(keys)}; give results as convllava eval writes them")
    ends = _interval(result)
    if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
        raise InputError(f"{path} has an interval that is not two numbers; give results as convllava eval writes them")
    return result


def _curve(axes: Any, name: str, results: Sequence[dict[str, Any]], colour: str) -> None:
    ordered = sorted(results, key=lambda result: result["efficiency"]["seconds_to_first_token"])
    seconds = [result["efficiency"]["seconds_to_first_token"] for result in ordered]
    scores = [result["score"] for result in ordered]
    areas = [_AREA * math.sqrt(result["model"]["parameters"]["tower"] / 1e6) for result in ordered]
    axes.plot(seconds, scores, color=colour, linewidth=1, alpha=0.6)
    axes.scatter(seconds, scores, areas, color=colour, label=name)
    axes.vlines(seconds, *zip(*map(_interval, ordered), strict=True), color=colour, linewidth=1, alpha=0.6)
    for x, y, result in zip(seconds, scores, ordered, strict=True):
        side = round(math.sqrt(result["efficiency"]["pixels"]))
        axes.annotate(str(side), (x, y), (6, -10), textcoords="offset points", fontsize=7, color=INK)


def _interval(result: dict[str, Any]) -> Sequence[float]:
    """Both ends; where there is none, the score itself."""
    return result.get("interval") or (result["score"],) * 2


def plot_heights(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Accuracy of reading by the height of the text in the canvas, a line for each resolution."""
    by_side: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_side[row["side"]].append(row)
    with axes_on(output, "held-out pages of the generated world: printed answers", _DPI) as axes:
        for place, (side, found) in enumerate(sorted(by_side.items())):
            heights = [row["height"] for row in found]
            accuracies = [row["accuracy"] for row in found]
            axes.plot(heights, accuracies, "o-", color=_COLOURS[place % len(_COLOURS)], markersize=4, label=str(side))
        axes.set_xlabel("height of the answer's tallest character, pixels that the tower sees")
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 1)
        if by_side:
            axes.legend(frameon=False, fontsize=7, title="resolution", title_fontsize=7)


def plot_severities(clean: float, rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Accuracy against severity, a line for each kind of disturbance; severity 0 is the page as it is."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    with axes_on(output, "held-out pages of the generated world, disturbed", _DPI) as axes:
        for place, (kind, found) in enumerate(by_kind.items()):
            severities = [0, *(row["severity"] for row in found)]
            accuracies = [clean, *(row["accuracy"] for row in found)]
            values = ", ".join(str(row["value"]) for row in found)
            colour = _COLOURS[place % len(_COLOURS)]
            axes.plot(severities, accuracies, "o-", color=colour, markersize=4, label=f"{kind} ({values})")
        axes.set_xticks(range(5))
        axes.set_xlabel("severity")
        axes.set_ylabel("accuracy")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=6)
