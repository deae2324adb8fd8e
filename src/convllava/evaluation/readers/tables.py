"""The files of benchmarks as rows, without their images: those are read when somebody looks, so that a benchmark of
gigabytes is listed in the memory of its texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convllava.errors import InputError
from convllava.evaluation.readers.parquet import read_parquet
from convllava.evaluation.readers.rows import Row
from convllava.evaluation.readers.tsv import read_tsv
from convllava.io import one_line, parse_lines


def read_rows(path: Path, images: Path) -> list[Row]:
    """All rows of a file.

    Args:
        path: Ends in one of `SUFFIXES`.
        images: Folder in which images that a row names are looked for.

    Raises:
        InputError: the file cannot be read, is damaged, or has no rows; the line names the row.
    """
    if path.suffix not in _READERS:
        raise InputError(f"{path}: a benchmark's file ends in {', '.join(SUFFIXES)}")
    try:
        rows = _READERS[path.suffix](path, images)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def read_records(path: Path, images: Path) -> list[Row]:
    """A list, an object with the list under `data`, an object of objects by id, or JSON lines under either suffix."""
    rows = []
    for number, record in enumerate(_records(path), start=1):
        where = f"record {number} of {path.name}"
        if not isinstance(record, dict):
            raise InputError(f"{where} is no object; got {str(record)[:40]!r}")
        rows.append(Row(where, record, {}))
    return rows


def _records(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\n" not in text.strip():
            raise InputError(f"{path} is not JSON: {error}") from None
        return [record for _, record in parse_lines(text, path)]
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return content["data"]
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        return [{"id": key} | value for key, value in content.items()]
    return content if isinstance(content, list) else [content]


_READERS = {".tsv": read_tsv, ".parquet": read_parquet, ".json": read_records, ".jsonl": read_records}
SUFFIXES = tuple(_READERS)
