"""Files of benchmarks as rows: TSV, Parquet, JSON and JSON lines.

Images stay in the file until they are needed, so even for a benchmark of many gigabytes only its texts are in memory.
"""

import ast
import base64
import binascii
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from convllava.errors import DataError, InputError
from convllava.evaluation.questions import MissingPicture, Picture, PictureFile
from convllava.io import one_line, parse_lines
from convllava.model.images import load_image

LONGEST_REFERENCE = 64
"""A shorter image cell of a TSV file is the index of the row that has the image (VLMEvalKit's rule)."""


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        where: Its place for messages, such as "row 3 of MME.tsv".
        cells: Values by column.
        pictures: Images by column.
    """

    where: str
    cells: Mapping[str, Any]
    pictures: Mapping[str, tuple[Picture, ...]]


def read_rows(path: Path, images: Path) -> list[Row]:
    """Read all rows of a file.

    Args:
        path: Ends in one of `SUFFIXES`.
        images: Folder of the images that rows name.

    Raises:
        DataError: if the file cannot be read, is damaged or has no rows; the message names the row.
    """
    if path.suffix not in _READERS:
        raise DataError(f"{path}: a benchmark's file ends in {', '.join(SUFFIXES)}")
    try:
        rows = _READERS[path.suffix](path, images)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def listed(cell: Any, *, only_of_texts: bool = False) -> list[str]:
    """Return the texts of a cell: a list, a list written as Python writes it, or one text.

    Args:
        only_of_texts: Read a written list only if all its items are quoted; "[8, 3]" is then one text.
    """
    if isinstance(cell, list | tuple):
        return [str(item) for item in cell]
    text = str(cell)
    if text.startswith("[") and text.endswith("]"):
        try:
            found = ast.literal_eval(text)  # reads values only; runs nothing
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        if isinstance(found, list) and not (only_of_texts and any(not isinstance(item, str) for item in found)):
            return [str(item) for item in found]
    return [text]


def find_image(folder: Path, name: str) -> Path:
    """Return the path of an image that a row names: by its path or its last part in the folder, or one folder deeper.

    If there is no such file, the path in the folder is returned, and loading it fails with that path.
    """
    last = Path(name).name
    for place in (folder / name, folder / last, *(deeper / last for deeper in _subfolders(folder))):
        try:
            if place.is_file():
                return place
        except (OSError, ValueError):  # too long for a name: the cell holds an image instead of its name
            continue
    return folder / name


@lru_cache(maxsize=16)
def _subfolders(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(entry for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()


def _decode(content: bytes, where: str) -> Image.Image:
    """Decode an image; errors name its row."""
    try:
        return load_image(content)
    except InputError as error:
        raise DataError(f"{where}: the image is {str(error).removeprefix('bytes: ')}") from None


@dataclass(frozen=True)
class TsvPicture:
    """Base64 in a TSV cell. Loading reads the row again, from the byte offset at which it begins."""

    path: Path
    offset: int
    column: int
    entry: int
    where: str

    def load(self) -> Image.Image:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            cell = next(csv.reader(_lines(file), delimiter="\t"))[self.column]
        try:
            content = base64.b64decode(listed(cell)[self.entry], validate=True)
        except (binascii.Error, ValueError):
            raise DataError(f"{self.where}: the image is not base64, or is cut short") from None
        return _decode(content, self.where)


def _lines(file: BinaryIO) -> Iterator[str]:
    """Yield the next lines as text. Between two lines, `file.tell()` is the byte offset of the next one."""
    for line in iter(file.readline, b""):
        yield line.decode("utf-8-sig" if file.tell() == len(line) else "utf-8")


def read_tsv(path: Path, images: Path) -> list[Row]:
    """Read a TSV file as VLMEvalKit writes it: a header, one question per row, images as base64 in the column `image`.

    An image cell may hold a list of images or, if it is short, the index of the row that has the image. Without such
    a column, `image_path` names files.

    Raises:
        DataError: if a row is damaged or cut short.
    """
    csv.field_size_limit(2**31 - 1)  # the module's default is smaller than a photograph
    read: list[tuple[str, dict[str, str], str, tuple[Picture, ...]]] = []
    by_index: dict[str, tuple[Picture, ...]] = {}
    with path.open("rb") as file:
        reader = csv.reader(_lines(file), delimiter="\t")
        where = f"the header of {path.name}"
        try:
            header = next(reader, [])
            column = header.index("image") if "image" in header else 0
            offset, where = file.tell(), f"row 1 of {path.name}"
            for values in reader:
                if values:  # there may be an empty line at the end
                    if len(values) != len(header):
                        raise DataError(
                            f"{where} has {len(values)} cells, but the header has {len(header)}; is the file cut short?"
                        )
                    cells = dict(zip(header, values, strict=True))
                    image = cells.pop("image", "")
                    is_reference = len(image) <= LONGEST_REFERENCE
                    count = 0 if is_reference else len(listed(image))
                    pictures: tuple[Picture, ...] = tuple(
                        TsvPicture(path, offset, column, entry, where) for entry in range(count)
                    )
                    if pictures:
                        by_index.setdefault(cells.get("index", where), pictures)
                    read.append((where, cells, image if is_reference else "", pictures))
                offset, where = file.tell(), f"row {len(read) + 1} of {path.name}"
        except csv.Error as error:
            raise DataError(f"{where} is damaged: {error}") from None
    rows = []
    for where, cells, reference, pictures in read:
        if reference:
            missing = MissingPicture(f"{where}: the image is that of index {reference}, and no row has it")
            pictures = by_index.get(reference, (missing,))
        elif not pictures and cells.get("image_path"):
            pictures = tuple(PictureFile(find_image(images, name)) for name in listed(cells["image_path"]))
        rows.append(Row(where, cells, {"image": pictures or (MissingPicture(f"{where}: no image"),)}))
    return rows


@dataclass(frozen=True)
class ParquetPicture:
    """An image in a Parquet cell: a struct with bytes, bytes alone, or an entry of a list of either."""

    path: Path
    group: int
    row: int
    column: str
    entry: int
    where: str

    def load(self) -> Image.Image:
        value = _read_column(self.path, self.group, self.column)[self.row].as_py()
        value = value[self.entry] if isinstance(value, list) else value
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise DataError(f"{self.where}: the column {self.column} holds no image")
        return _decode(content, self.where)


def read_parquet(path: Path, images: Path) -> list[Row]:
    """Read a Parquet file as the datasets library writes it: images are structs of `bytes` and `path`.

    Raises:
        DataError: if the file is damaged, or pyarrow is missing.
    """
    file = _open_parquet(path)
    leaves = [file.metadata.schema.column(index).path for index in range(file.metadata.num_columns)]
    binary = {field.name for field in file.schema_arrow if str(field.type) in ("binary", "large_binary")}
    binary |= {leaf for leaf in leaves if leaf.endswith(".bytes")}
    image_columns = sorted({leaf.split(".")[0] for leaf in binary})
    rows: list[Row] = []
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group, columns=[leaf for leaf in leaves if leaf not in binary])
        for place, cells in enumerate(table.to_pylist()):
            where = f"row {len(rows) + 1} of {path.name}"
            pictures: dict[str, tuple[Picture, ...]] = {}
            for name in image_columns:
                # The cell without its bytes still shows how many images it has.
                value = cells.pop(name, True)
                count = len(value) if isinstance(value, list) else int(value is not None)
                pictures[name] = tuple(ParquetPicture(path, group, place, name, n, where) for n in range(count))
            rows.append(Row(where, cells, pictures))
    return rows


@lru_cache(maxsize=8)
def _read_column(path: Path, group: int, column: str) -> Any:
    """Read a column of one row group. Questions come in the order of the rows, so each group is read once."""
    return _open_parquet(path).read_row_group(group, columns=[column]).column(0)


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError("Parquet files need pyarrow; pip install 'convllava[eval]'") from None
    try:
        return ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {one_line(error)}") from None


def read_json(path: Path, images: Path) -> list[Row]:
    """Read a list, an object with the list under `data`, an object of objects by id, or JSON lines."""
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\n" not in text.strip():
            raise DataError(f"{path} is not JSON: {error}") from None
        content = [record for _, record in parse_lines(text, path)]
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        content = [{"id": key} | value for key, value in content.items()]
    rows = []
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        where = f"record {number} of {path.name}"
        if not isinstance(record, dict):
            raise DataError(f"{where} is not an object; got {str(record)[:40]!r}")
        rows.append(Row(where, record, {}))
    return rows


_READERS = {".tsv": read_tsv, ".parquet": read_parquet, ".json": read_json, ".jsonl": read_json}
SUFFIXES = tuple(_READERS)
