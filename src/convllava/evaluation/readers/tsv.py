"""TSV files as VLMEvalKit writes them: a header, a question a row, images as base64 in the column `image`.

A cell of `image` may hold a list of images, or, where it is short, the index of the row that has the image. Where there
is no such column, `image_path` names files.
"""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from convllava.errors import InputError
from convllava.evaluation.questions import NoPicture, Picture, PictureFile
from convllava.evaluation.readers.rows import Row, decoded, find_image, listed

LONGEST_REFERENCE = 64
"""Characters of an image cell that is still the index of another row and no image (VLMEvalKit's rule)."""
_LARGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class TsvPicture:
    """Base64 in a cell that is read anew from the byte at which its row begins."""

    path: Path
    offset: int
    column: int
    entry: int
    where: str

    def load(self) -> Image.Image:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            cell = next(csv.reader(_Lines(file), delimiter="\t"))[self.column]
        try:
            content = base64.b64decode(listed(cell)[self.entry], validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{self.where}: the image is no base64, or cut short") from None
        return decoded(content, self.where)


@dataclass(frozen=True)
class _Line:
    """A row before its image is known: `images` of its own, or the index that it refers to."""

    where: str
    offset: int
    cells: dict[str, str]
    images: int
    reference: str

    @property
    def index(self) -> str:
        return self.cells.get("index", self.where)


def read_tsv(path: Path, images: Path) -> list[Row]:
    """The rows; images stay in the file.

    Raises:
        InputError: a row is cut short, or is none.
    """
    csv.field_size_limit(_LARGEST_CELL)  # the module's own limit is less than a photograph
    with path.open("rb") as file:
        header, lines = _lines(file, path)
    column = header.index("image") if "image" in header else 0
    own = [
        tuple(TsvPicture(path, line.offset, column, entry, line.where) for entry in range(line.images))
        for line in lines
    ]
    # Of rows with the same index the first, which is written last here.
    held = {line.index: pictures for line, pictures in zip(reversed(lines), reversed(own), strict=True) if pictures}
    return [
        Row(line.where, line.cells, {"image": pictures or _elsewhere(line, held, images)})
        for line, pictures in zip(lines, own, strict=True)
    ]


def _lines(file: BinaryIO, path: Path) -> tuple[list[str], list[_Line]]:
    source = _Lines(file)
    reader = csv.reader(source, delimiter="\t")
    header = _next(reader, f"the header of {path.name}") or []
    found: list[_Line] = []
    while True:
        offset, where = source.offset, f"row {len(found) + 1} of {path.name}"
        cells = _next(reader, where)
        if cells is None:
            return header, found
        if cells:  # an empty line at the end is no row
            found.append(_line(where, offset, header, cells))


def _next(reader: Any, where: str) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise InputError(f"{where} is damaged: {error}") from None


def _line(where: str, offset: int, header: list[str], cells: list[str]) -> _Line:
    if len(cells) != len(header):
        raise InputError(f"{where} has {len(cells)} cells where the header has {len(header)}; is the file cut short?")
    named = dict(zip(header, cells, strict=True))
    image = named.pop("image", "")
    is_reference = len(image) <= LONGEST_REFERENCE
    return _Line(where, offset, named, 0 if is_reference else len(listed(image)), image if is_reference else "")


def _elsewhere(line: _Line, held: Mapping[str, tuple[Picture, ...]], images: Path) -> tuple[Picture, ...]:
    """Images of the row that a row refers to, or those in the files it names."""
    if line.reference:
        return held.get(line.reference) or (
            NoPicture(f"{line.where}: the image is that of index {line.reference}, and no row has it"),
        )
    named = listed(line.cells["image_path"]) if line.cells.get("image_path") else []
    files: tuple[Picture, ...] = tuple(PictureFile(find_image(images, name)) for name in named)
    return files or (NoPicture(f"{line.where}: no image"),)


class _Lines:
    """The lines of a file as text, and the byte at which the next one begins."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.offset = file, file.tell()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        start, self.offset = self.offset, self.offset + len(line)
        return line.decode("utf-8-sig" if start == 0 else "utf-8")
