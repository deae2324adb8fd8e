"""Two results of one benchmark, question by question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from convllava.errors import InputError
from convllava.evaluation.intervals import mean_interval
from convllava.evaluation.results import rounded
from convllava.io import RESULT, read_json


class Difference(TypedDict):
    """Mean scores of A and of B on the same questions, B less A, and the interval of that."""

    n: int
    a: float
    b: float
    difference: float
    interval: list[float]


def read_result(path: Path) -> dict[str, Any]:
    """A result by its file, or by the folder that a run wrote it into.

    Raises:
        InputError: it is not there, or is none.
    """
    file = path / RESULT if path.is_dir() else path
    result = read_json(file)
    lacking = [key for key in ("benchmark", "primary", "score", "units") if key not in result]
    if lacking:
        raise InputError(f"{file} lacks {lacking[0]!r}; give a {RESULT} of convllava eval, or its folder")
    if not _is_number(result["score"]):
        raise InputError(f"{file}: the score must be a number; give a {RESULT} as convllava eval writes it")
    units = result["units"] if isinstance(result["units"], list) else [None]
    for number, unit in enumerate(units, start=1):
        if not _is_unit(unit):
            raise InputError(f"{file}: unit {number} lacks an id, categories or a score; make the result again")
    return result


def _is_unit(unit: Any) -> bool:
    if not isinstance(unit, dict) or not isinstance(unit.get("categories"), list):
        return False
    has_names = all(isinstance(name, str) for name in (unit.get("id"), *unit["categories"]))
    return has_names and _is_number(unit.get("score"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def compare(a: Path, b: Path, *, seed: int = 0) -> dict[str, Any]:
    """How much better B is than A, by category and overall.

    Scores are those of single questions, of MMBench of questions with all their rotations, so that the difference is
    one of accuracies also where a benchmark reports another number. The interval is that of a paired bootstrap.

    Returns:
        benchmark, the names a and b, `overall` and `categories` of `Difference`.

    Raises:
        InputError: they are of different benchmarks, of different questions, or of none.
    """
    first, second = read_result(a), read_result(b)
    if first["benchmark"] != second["benchmark"]:
        raise InputError(f"{a} is of {first['benchmark']} and {b} of {second['benchmark']}; compare one benchmark")
    ours, theirs = ({unit["id"]: unit for unit in result["units"]} for result in (first, second))
    if only := sorted(set(ours) ^ set(theirs)):
        raise InputError(
            f"{a} and {b} are of different questions: {len(only)} are in one alone, such as {only[0]}; "
            "use the same --limit, --split and --category"
        )
    if not ours:
        raise InputError(f"{a} and {b} have no units, so there is nothing to compare; make the results again")
    pairs = [(ours[name]["score"], theirs[name]["score"]) for name in ours]
    names = sorted({category for unit in ours.values() for category in unit["categories"]})
    parts = {
        name: [pair for pair, unit in zip(pairs, ours.values(), strict=True) if name in unit["categories"]]
        for name in names
    }
    return {
        "benchmark": first["benchmark"],
        "a": str(a),
        "b": str(b),
        "overall": _difference(pairs, seed),
        "categories": {name: _difference(part, seed) for name, part in parts.items()},
    }


def _difference(pairs: Sequence[tuple[float, float]], seed: int) -> Difference:
    differences = [b - a for a, b in pairs]
    low, high = mean_interval(differences, seed=seed)
    count = len(pairs)
    return {
        "n": count,
        "a": rounded(sum(a for a, _ in pairs) / count),
        "b": rounded(sum(b for _, b in pairs) / count),
        "difference": rounded(sum(differences) / count),
        "interval": [rounded(low), rounded(high)],
    }
