"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

_LISTED = 8
"""Ids of a kind that a line names; the JSON has all."""


def tables_of(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """A result: its measures by category and overall, and a line for each thing that went wrong."""
    names = list(result["measures"])
    low, high = result["interval"]
    title = f"{result['benchmark']}: {result['primary']} {_number(result['score'])} ({_number(low)} to {_number(high)})"
    table = Table(title=title, title_justify="left")
    table.add_column("category")
    for name in ("n", *names):
        table.add_column(name, justify="right")
    for category, measures in result["categories"].items():
        table.add_row(category, str(int(measures["n"])), *(_number(measures[name]) for name in names))
    table.add_row("all", str(result["questions"]), *(_number(result["measures"][name]) for name in names))
    yield table
    yield from troubles(result)


def troubles(result: Mapping[str, Any]) -> Iterator[str]:
    """Answers that could not be read, questions without one, and the like: how many, and which."""
    kinds = {
        "unparsed": "could not be read and count as wrong",
        "missing": "have no answer and count as wrong",
        "unknown": "are ids of no question",
        "absent": "have no questions and add nothing to the sum",
    }
    for kind, meaning in kinds.items():
        if found := result[kind]:
            more = ", ..." if len(found) > _LISTED else ""
            yield f"{kind}: {len(found)} {meaning}: {', '.join(found[:_LISTED])}{more}"
    for item in result["broken"][:_LISTED]:
        yield f"broken: {item['id']} counts as wrong: {item['reason']}"
    if len(result["broken"]) > _LISTED:
        yield f"broken: {len(result['broken'])} in all"


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """What B has more than A, by category and overall."""
    title = f"{comparison['benchmark']}: B - A, 95 % of bootstrap draws; A {comparison['a']}, B {comparison['b']}"
    table = Table(title=title, title_justify="left")
    table.add_column("category")
    for name in ("n", "A", "B", "difference", "from", "to"):
        table.add_column(name, justify="right")
    for category, row in [*comparison["categories"].items(), ("all", comparison["overall"])]:
        numbers = (row["a"], row["b"], row["difference"], *row["interval"])
        table.add_row(category, str(row["n"]), *(_number(value) for value in numbers))
    return table


def rows_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """Rows of plain values, of which some columns are shown."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("kind", "value") else "right")
    for row in rows:
        table.add_row(*(row[name] if isinstance(row[name], str) else _number(row[name]) for name in columns))
    return table


def pairs_table(title: str, values: Mapping[str, Any]) -> Table:
    """Names and values, a row each."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), value if isinstance(value, str) else _number(value))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
