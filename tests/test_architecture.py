"""The rooms of the package: each has one owner in the table, and imports point down the data flow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import convllava

PACKAGE = Path(convllava.__file__).parent
DOCUMENT = Path(__file__).parent.parent / "docs" / "architecture.md"
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
ROOMS -= {"__init__", "__main__"}


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file names in its imports, at its head or within."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("convllava."))


def graph() -> dict[str, set[str]]:
    rooms = {room: list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"] for room in ROOMS}
    return {room: {name for path in paths for name in imported(path)} & ROOMS - {room} for room, paths in rooms.items()}


def test_imports_point_down_the_data_flow():
    found = graph()
    assert "modeling" in found["inference"]
    assert list(TopologicalSorter(found).static_order())  # raises where rooms need each other
    assert not [room for room in ("data", "inference", "evaluation", "serving") if "training" in found[room]]


def test_every_room_has_its_row():
    table = DOCUMENT.read_text(encoding="utf-8").split("## Rooms")[1]
    assert not [room for room in ROOMS if f"`{room}.py`" not in table and f"`{room}/`" not in table]
