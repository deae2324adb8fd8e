"""What every format offers: any record by its number."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convllava.errors import InputError


class Embedded(NamedTuple):
    """An encoded image that lies in the data file itself."""

    name: str
    content: bytes


WINDOW_BYTES = 128 * 2**20
"""Of blocks whose records come mixed, and which are kept meanwhile: so much, and the largest of them."""


@dataclass(frozen=True)
class Blocks:
    """Stretches of neighbouring records that are read together: the first record's number and the bytes of each."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


class Records(ABC):
    """The records of a data file, any of them by its number; the training order is then a list of numbers, which a
    resumed run only has to count through.

    A record is a dict in LLaVA's layout: `id`, `conversations`, and `image`, whose items are paths or `Embedded`.
    """

    name: str
    """What reports call it."""
    embeds_images = True
    """Whether the images lie in the file, not beside it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `InputError` where the record is damaged."""

    @property
    def blocks(self) -> Blocks | None:
        """None where every record is as near as any other."""
        return None


class Packed:
    """A list of JSON values kept as bytes: hundreds of thousands of dicts would be copied by every worker."""

    def __init__(self, values: Iterable[Any]) -> None:
        lines = [json.dumps(value).encode() for value in values]
        self.ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self.content = np.frombuffer(b"".join(lines), dtype=np.uint8)

    @classmethod
    def of_arrays(cls, ends: NDArray[np.int64], content: NDArray[np.uint8]) -> Packed:
        """What another one held."""
        packed = cls([])
        packed.ends, packed.content = ends, content
        return packed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Any:
        start = self.ends[index - 1] if index else 0
        return json.loads(self.content[start : self.ends[index]].tobytes())


class Shards(Records):
    """Several files as one, from the beginning up to a limit."""

    def __init__(self, name: str, parts: Sequence[Records], limit: int | None = None) -> None:
        self.name, self.parts = name, list(parts)
        self.embeds_images = all(part.embeds_images for part in parts)
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        whole = int(self.ends[-1])
        self.length = whole if limit is None else min(limit, whole)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - int(self.ends[part - 1] if part else 0)]

    @property
    def blocks(self) -> Blocks | None:
        found = [part.blocks for part in self.parts]
        firsts = (self.ends - [len(part) for part in self.parts]).tolist()
        pairs = [(blocks.starts + first, blocks.sizes) for blocks, first in zip(found, firsts, strict=True) if blocks]
        if len(pairs) < len(found):
            return None
        starts, sizes = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        return Blocks(starts[starts < self.length], sizes[starts < self.length])


def record_of(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A row of a table as a record: LLaVA-OneVision's columns (`id`, `image`, `conversations`), or FineVision's
    (`images`, `texts`: a list of {user, assistant})."""
    turns = _turns_of(row["texts"]) if isinstance(row.get("texts"), list) else row.get("conversations")
    given = row.get("images") if "images" in row else row.get("image")
    given = given if isinstance(given, list) else [given]
    images = [_image_of(image, place) for place, image in enumerate(given, 1) if image is not None]
    named = row.get("id")
    return {"id": number if named is None else named, "image": images, "conversations": turns}


def _turns_of(texts: list[Any]) -> list[Any]:
    """FineVision's pairs as LLaVA's turns; what is no pair stays as it is, and is found wrong later."""
    turns: list[Any] = []
    for pair in texts:
        if isinstance(pair, dict):
            turns += [{"from": "human", "value": pair.get("user")}, {"from": "gpt", "value": pair.get("assistant")}]
        else:
            turns.append(pair)
    return turns


def _image_of(image: Any, place: int) -> Any:
    """An image of a table, {bytes, path} as a rule; what is none stays as it is, and is found wrong later."""
    image = {"bytes": image} if isinstance(image, bytes) else image
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return Embedded(str(image.get("path") or f"image {place}"), image["bytes"])
    return image.get("path") if isinstance(image, dict) else image


TABLE_COLUMNS = ("id", "image", "images", "conversations", "texts")


def columns_of(known: Sequence[str], where: str) -> list[str]:
    """Those of the columns that make a record.

    Raises:
        InputError: none of them holds a conversation.
    """
    found = [name for name in TABLE_COLUMNS if name in known]
    if not {"conversations", "texts"} & set(found):
        raise InputError(
            f"{where} has the columns {', '.join(known) or '(none)'}; give it conversations, a list of (from, value), "
            "with image, or texts, a list of (user, assistant), with images"
        )
    return found
