"""The interface of all formats: any record by its number."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convllava.errors import DataError

WINDOW_BYTES = 128 * 2**20
"""Bytes of row groups that are shuffled together and kept in memory (plus the largest of them)."""


class Embedded(NamedTuple):
    """An encoded image inside the data file, and its name for error messages."""

    name: str
    content: bytes


@dataclass(frozen=True)
class RowGroups:
    """Neighbouring records that can only be read together: the number of each group's first record, and its bytes."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


class Records(ABC):
    """The records of one or more data files, each readable by its number in any order.

    A record is a dict in LLaVA's layout: `id`, `conversations`, and `image`, whose items are paths or `Embedded`. The
    order of training is a list of record numbers, so a resumed run needs only its position.
    """

    name: str
    """Name in reports."""
    embeds_images = True
    """True if the images are inside the data file instead of in separate files."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a record.

        Raises:
            DataError: if the record is damaged.
        """

    @property
    def row_groups(self) -> RowGroups | None:
        """Groups of records that can only be read together, or None if every record can be read alone."""
        return None


class PackedJson:
    """A list of JSON values, stored as bytes in one array.

    Hundreds of thousands of dicts would be copied into every worker process, because reference counts change them.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        lines = [json.dumps(value).encode() for value in values]
        self.ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self.content = np.frombuffer(b"".join(lines), dtype=np.uint8)

    @classmethod
    def from_arrays(cls, ends: NDArray[np.int64], content: NDArray[np.uint8]) -> PackedJson:
        """Restore a list from its two arrays."""
        packed = cls([])
        packed.ends, packed.content = ends, content
        return packed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Any:
        start = self.ends[index - 1] if index else 0
        return json.loads(self.content[start : self.ends[index]].tobytes())


class Shards(Records):
    """Several files as one list of records, up to an optional limit."""

    def __init__(self, name: str, files: Sequence[Records], limit: int | None = None) -> None:
        self.name, self.files = name, list(files)
        self.embeds_images = all(file.embeds_images for file in files)
        self.ends = np.cumsum([len(file) for file in files], dtype=np.int64)
        total = int(self.ends[-1])
        self.length = total if limit is None else min(limit, total)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return self.files[file][index - int(self.ends[file - 1] if file else 0)]

    @property
    def row_groups(self) -> RowGroups | None:
        found = [(file.row_groups, int(end) - len(file)) for file, end in zip(self.files, self.ends, strict=True)]
        groups = [(own.starts + first, own.sizes) for own, first in found if own is not None]
        if len(groups) < len(found):
            return None
        starts, sizes = (np.concatenate(arrays) for arrays in zip(*groups, strict=True))
        return RowGroups(starts[starts < self.length], sizes[starts < self.length])


TABLE_COLUMNS = ("id", "image", "images", "conversations", "texts")


def columns_of(known: Sequence[str], where: str) -> list[str]:
    """Return the columns of a table that a record needs.

    Raises:
        DataError: if none of the columns holds a conversation.
    """
    found = [name for name in TABLE_COLUMNS if name in known]
    if not {"conversations", "texts"} & set(found):
        raise DataError(
            f"{where} has the columns {', '.join(known) or '(none)'}; give it conversations, a list of (from, value), "
            "with image, or texts, a list of (user, assistant), with images"
        )
    return found


def record_of(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Turn a row of a table into a record.

    The columns are those of LLaVA-OneVision (`id`, `image`, `conversations`), or of FineVision (`images`, and `texts`,
    a list of {user, assistant}). Malformed values are kept; `records.conversation_of` rejects them later.
    """
    turns = row.get("conversations")
    if isinstance(row.get("texts"), list):
        turns = []
        for pair in row["texts"]:
            if isinstance(pair, dict):
                turns.append({"from": "human", "value": pair.get("user")})
                turns.append({"from": "gpt", "value": pair.get("assistant")})
            else:
                turns.append(pair)
    given = row.get("images") if "images" in row else row.get("image")
    images: list[Any] = []
    for place, image in enumerate(given if isinstance(given, list) else [given], start=1):
        content = {"bytes": image} if isinstance(image, bytes) else image
        if isinstance(content, dict) and isinstance(content.get("bytes"), bytes):
            images.append(Embedded(str(content.get("path") or f"image {place}"), content["bytes"]))
        elif image is not None:
            images.append(content.get("path") if isinstance(content, dict) else content)
    name = row.get("id")
    return {"id": number if name is None else name, "image": images, "conversations": turns}
