"""Reads the data files of the generated world: words and questions, under [headings]."""

from __future__ import annotations

from importlib import resources


def sections(name: str) -> dict[str, list[str]]:
    """The lines under each [heading] of the data file `name`; empty lines and # comments are left out."""
    text = resources.files("convllava.synthetic").joinpath(name).read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            found[next(reversed(found))].append(line)
    return found
