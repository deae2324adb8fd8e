"""LLaVA's own layout: a JSON list of records, or JSON Lines. The images are separate files."""

from typing import Any

from convllava.data import storage
from convllava.data.formats.base import PackedJson, Records
from convllava.errors import DataError
from convllava.io import parse_json, parse_lines


class JsonRecords(Records):
    """The records of a .json or .jsonl file.

    Raises:
        DataError: if the file is missing, is not JSON or is not a list of objects.
    """

    embeds_images = False

    def __init__(self, address: str) -> None:
        self.name = address
        try:
            with storage.opened(address) as file:
                text = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{address} cannot be read: {error}") from None
        if address.lower().endswith(".jsonl"):
            content = [value for _, value in parse_lines(text, address)]
        else:
            content = parse_json(text, address)
        if not isinstance(content, list) or not content or not all(isinstance(record, dict) for record in content):
            raise DataError(f"{address} must hold a list of one or more records, each an object with conversations")
        self.content = PackedJson(content)

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.content[index]
