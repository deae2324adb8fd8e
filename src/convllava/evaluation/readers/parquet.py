"""Parquet files as the Hugging Face datasets library writes them: images are structs of `bytes` and `path`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from convllava.errors import InputError
from convllava.evaluation.readers.rows import Row, decoded
from convllava.io import one_line


@dataclass(frozen=True)
class ParquetPicture:
    """An image in a cell: a struct with bytes, bytes alone, or one of a list of either."""

    path: Path
    group: int
    row: int
    column: str
    entry: int
    where: str

    def load(self) -> Image.Image:
        value = _column(self.path, self.group, self.column)[self.row].as_py()
        value = value[self.entry] if isinstance(value, list) else value
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise InputError(f"{self.where}: the column {self.column} holds no image")
        return decoded(content, self.where)


def read_parquet(path: Path, images: Path) -> list[Row]:
    """The rows; the bytes of images stay in the file.

    Raises:
        InputError: the file is damaged, or pyarrow is missing.
    """
    file = _open(path)
    leaves = [file.metadata.schema.column(index).path for index in range(file.metadata.num_columns)]
    heavy = {field.name for field in file.schema_arrow if str(field.type) in ("binary", "large_binary")}
    heavy |= {leaf for leaf in leaves if leaf.endswith(".bytes")}
    columns = sorted({leaf.split(".")[0] for leaf in heavy})
    rows: list[Row] = []
    for group in range(file.metadata.num_row_groups):
        light = file.read_row_group(group, columns=[leaf for leaf in leaves if leaf not in heavy])
        for place, cells in enumerate(light.to_pylist()):
            where = f"row {len(rows) + 1} of {path.name}"
            counts = {name: _count(cells.pop(name, True)) for name in columns}
            pictures = {
                name: tuple(ParquetPicture(path, group, place, name, entry, where) for entry in range(count))
                for name, count in counts.items()
            }
            rows.append(Row(where, cells, pictures))
    return rows


def _count(value: Any) -> int:
    """Images in a cell, told from what is left of it without the bytes."""
    return len(value) if isinstance(value, list) else int(value is not None)


@lru_cache(maxsize=8)
def _column(path: Path, group: int, column: str) -> Any:
    """Of one row group. Questions come in the order of rows, so that each is read once."""
    return _open(path).read_row_group(group, columns=[column]).column(0)


def _open(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError("Parquet files need pyarrow; pip install 'convllava[eval]'") from None
    try:
        return ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {one_line(error)}") from None
