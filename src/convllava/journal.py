"""What a run finds, on disk as it comes, so that a run that was killed continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convllava.errors import InputError
from convllava.files import make_output, parse_lines, read_json, write_json

ANSWERS, JUDGEMENTS, SETTINGS, RESULT = "answers.jsonl", "judgements.jsonl", "settings.json", "result.json"
WEIGHTS = "weights"
"""The setting that tells the weights of a model from those that lay under its name before."""
_LOOKED_AT = 1024
"""Numbers of a tensor that `weights_digest` looks at."""
Entry = Mapping[str, Any]
"""An object with a text under `id`."""


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


def weights_digest(model: nn.Module) -> str:
    """The precision of a model's weights, and a digest that other weights do not have, wherever their files lie.

    Of each tensor at most 1024 numbers count, evenly spaced: training changes nearly all numbers of what trains, and a
    model of many gigabytes is not read as a whole.
    """
    content, precisions = hashlib.blake2b(digest_size=8), set()
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()
        some = numbers[:: max(1, -(-len(numbers) // _LOOKED_AT))].cpu().contiguous()
        content.update(f"{name} {tuple(weight.shape)}".encode() + some.view(torch.uint8).numpy().tobytes())
        precisions.add(str(weight.dtype).removeprefix("torch."))
    return f"{' and '.join(sorted(precisions))} {content.hexdigest()}"
