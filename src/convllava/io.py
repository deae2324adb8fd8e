"""Files on disk: JSON, files that are replaced as a whole, and records that survive a killed run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convllava.errors import InputError

ANSWERS, JUDGEMENTS, SETTINGS, RESULT = "answers.jsonl", "judgements.jsonl", "settings.json", "result.json"
WEIGHTS = "weights"
"""The setting that tells the weights of a model from those that lay under its name before."""
Entry = Mapping[str, Any]
"""An object with a text under `id`."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's: owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def one_line(error: Exception) -> str:
    """The first line of what an error says, with the second where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # too deeply nested
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object; got {str(content)[:40]}")
    return content


def parse_lines(text: str, path: Path | str) -> Iterator[tuple[str, Any]]:
    """Where each line of a JSON lines file stands, and its value; blank lines are left out.

    Raises:
        InputError: a line that is not JSON.
    """
    # Not by splitlines, which also breaks at separators that a text may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            yield where, parse_json(line, where)


def parse_json(text: str, where: str) -> Any:
    """The value of a text; InputError names where it stands."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None


def write_json(path: Path, content: Any) -> None:
    """Write it beside and rename: the file is the old one or the new one, whatever happens.

    Raises:
        InputError: it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_output(folder: Path) -> None:
    """Make the folder that --output names, where there is none.

    Raises:
        InputError: it cannot be one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder} cannot be a folder: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which it replaces when the block ends well; else it is gone.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or one_line(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


class Journal:
    """The entries of one run by their ids: in memory, and in a folder where one is given.

    Args:
        folder: Holds the entries, a line each, and their settings.
        settings: What the entries depend on. A run that was begun before `WEIGHTS` was among them takes it up.
        name: Of the file with the entries.
        settings_name: Of the file with the settings.

    Raises:
        InputError: the folder's entries were made with other settings, which the message tells; or it cannot be one.
    """

    def __init__(
        self, folder: Path | None, settings: Mapping[str, Any], name: str = ANSWERS, settings_name: str = SETTINGS
    ) -> None:
        self.path = None if folder is None else folder / name
        self.entries: dict[str, Entry] = {}
        if self.path is not None:
            _begin(self.path, settings, settings_name)
            self.entries = {entry["id"]: entry for entry in _continued(self.path)}

    def add(self, entries: Iterable[Entry]) -> None:
        """Keep entries whose ids have none yet.

        Raises:
            InputError: the file cannot be written.
        """
        fresh = [entry for entry in entries if entry["id"] not in self.entries]
        self.entries |= {entry["id"]: entry for entry in fresh}
        if self.path is not None and fresh:
            _append(self.path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in fresh))


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; the run continues where there is room") from None


def _begin(entries: Path, settings: Mapping[str, Any], settings_name: str) -> None:
    folder = entries.parent
    wanted = json.loads(json.dumps(settings))  # as it will be read back
    make_output(folder)
    path = folder / settings_name
    if not path.exists():
        if entries.exists():
            raise InputError(f"{folder} holds {entries.name} without {settings_name}; choose another --output")
        write_json(path, wanted)
        return
    kept = read_json(path)
    before = {key: wanted[key] for key in (WEIGHTS,) if key in wanted} | kept
    changed = [key for key in {**before, **wanted} if before.get(key) != wanted.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {before.get(key)!r} and is {wanted.get(key)!r}" for key in changed)
        raise InputError(f"{folder} holds answers made otherwise: {differences}; choose another --output")
    if before != kept:
        write_json(path, before)


def _continued(path: Path) -> list[Entry]:
    """The entries of a run, but for a last line that was cut short, which is taken off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError as error:
        number = whole.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {number} of {path} is not UTF-8: {error.reason}; choose another --output") from None
    entries: list[Entry] = []
    for where, entry in parse_lines(text, path):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise InputError(f"{where} is no entry of a run; choose another --output")
        entries.append(entry)
    return entries
