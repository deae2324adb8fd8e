"""The structure of the package: each room has its row in docs/architecture.md, and imports point down the data flow."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import convllava

PACKAGE = Path(convllava.__file__).parent
DOCUMENT = Path(__file__).parent.parent / "docs" / "architecture.md"
ORDER = (
    "errors",
    "io",
    "geometry",
    "display",
    "model",
    "checkpoints",
    "synthetic",
    "export",
    "data",
    "inference",
    "training",
    "evaluation",
    "serving",
    "integrations",
    "cli",
)
"""Rooms from the bottom to the top: a room imports only those before it."""
STRANGERS = {("evaluation", "training"), ("serving", "training"), ("serving", "evaluation"), ("data", "inference")}
"""Pairs (room, import) that the order allows but the design does not."""


def module_graph() -> dict[str, set[str]]:
    """Each module of the package with the modules that it imports, at the top of the file or inside a function.

    The package's own `__init__` and `__main__` are left out: they offer what is below them.
    """
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph = {}
    for name, path in paths.items():
        if name in ("__init__", "__main__"):
            continue
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("convllava."):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}".removeprefix("convllava.")
                    found.add(full if full in paths else full.rpartition(".")[0])
            elif isinstance(node, ast.Import):
                found |= {a.name.removeprefix("convllava.") for a in node.names if a.name.startswith("convllava.")}
        graph[name] = found & set(paths) - {name, ""}
    return graph


def test_modules_have_no_import_circle():
    graph = module_graph()
    assert "model.modeling" in graph["inference.assistant"]
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_rooms_import_only_rooms_below():
    imports = defaultdict(set)
    for name, found in module_graph().items():
        room = name.split(".")[0]
        imports[room] |= {other.split(".")[0] for other in found} - {room}
    assert set(imports) == set(ORDER)
    upward = {
        (room, other) for room, found in imports.items() for other in found if ORDER.index(other) > ORDER.index(room)
    }
    pairs = {(room, other) for room, found in imports.items() for other in found}
    assert not upward
    assert not pairs & STRANGERS


def test_every_room_has_its_row():
    table = DOCUMENT.read_text(encoding="utf-8").split("## Rooms")[1]
    assert not [room for room in ORDER if f"`{room}.py`" not in table and f"`{room}/`" not in table]
