"""LLaVA's own layout: a JSON list of records, or JSONL; images lie beside it as files."""

from __future__ import annotations

from typing import Any

from convllava.data import storage
from convllava.data.formats.base import Packed, Records
from convllava.errors import InputError
from convllava.io import parse_json, parse_lines


class TextRecords(Records):
    """The records of a .json or .jsonl file.

    Raises:
        InputError: no such file, not JSON, or no list of records.
    """

    embeds_images = False

    def __init__(self, address: str) -> None:
        self.name = address
        self.content = Packed(_records_in(address))

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.content[index]


def _records_in(address: str) -> list[dict[str, Any]]:
    try:
        with storage.opened(address) as file:
            text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{address} cannot be read: {error}") from None
    is_lines = address.lower().endswith(".jsonl")
    content = [value for _, value in parse_lines(text, address)] if is_lines else parse_json(text, address)
    if not isinstance(content, list) or not content or not all(isinstance(record, dict) for record in content):
        raise InputError(f"{address} must hold a list of records, one or more, each an object with conversations")
    return content
