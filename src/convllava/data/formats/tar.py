"""WebDataset shards: tar files in which the members of one sample share a name up to the first dot.

`0001.json` holds a record in LLaVA's layout, or `0001.txt` a caption; `0001.jpg`, or `0001.0.jpg`, `0001.1.jpg`, are
its images in the order of their names. The headers are read once, and samples then straight from where they lie: a
shard gives random access like any other file, so no stream is replayed where a run resumes. Nothing is extracted.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from convllava.data import storage
from convllava.data.collate import CAPTION_REQUESTS
from convllava.data.formats import tar_index
from convllava.data.formats.base import Embedded, Packed, Records
from convllava.errors import InputError
from convllava.io import one_line

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TEXTS = ("json", "txt")
Member = tuple[str, int, int]
"""Name, offset and size in bytes."""


class TarRecords(Records):
    """The samples of an uncompressed tar file.

    Raises:
        InputError: not a plain tar file, cut short, a member that is no regular file inside it, or no text at all.
    """

    def __init__(self, address: str) -> None:
        self.name = address
        index = tar_index.kept(address)
        if index is None:
            index = _index(address)
            tar_index.keep(address, index)
        self.samples = index

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, members = self.samples[index]
        with storage.opened(self.name) as file:
            contents: dict[str, bytes] = {}
            for name, offset, size in members:
                file.seek(offset)
                contents[name] = file.read(size)
        images = [Embedded(name, contents[name]) for name in sorted(contents) if _ending(name) in IMAGES]
        texts = [name for name in sorted(contents) if _ending(name) in TEXTS]
        record = self._text(texts[0], contents[texts[0]], index) if texts else {}
        return {"id": key} | record | ({"image": images} if images else {})

    def _text(self, name: str, content: bytes, index: int) -> dict[str, Any]:
        try:
            text = content.decode("utf-8")
            record = json.loads(text) if _ending(name) == "json" else _captioned(text, index)
        except ValueError as error:
            raise InputError(f"{name} is not {_ending(name)}: {one_line(error)}") from None
        if not isinstance(record, dict):
            raise InputError(f"{name} must hold an object with conversations")
        return record


def _index(address: str) -> Packed:
    """Of each sample its key and its members, in the order in which samples begin."""
    members = [member for member in _members(address) if _ending(member[0]) in (*IMAGES, *TEXTS)]
    if not any(_ending(name) in TEXTS for name, *_ in members):
        raise InputError(f"{address} holds neither KEY.json nor KEY.txt beside its images")
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(_key(member[0]), []).append(member)
    return Packed(groups.items())


def _captioned(caption: str, index: int) -> dict[str, Any]:
    request = CAPTION_REQUESTS[index % len(CAPTION_REQUESTS)]
    return {"conversations": [{"from": "human", "value": request}, {"from": "gpt", "value": caption.strip()}]}


def _members(address: str) -> Iterator[Member]:
    with storage.opened(address) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if not member.isdir():
                        _check(member, address)
                        yield member.name, member.offset_data, member.size
        except (tarfile.TarError, OSError, EOFError, UnicodeError) as error:
            raise InputError(
                f"{address} is not a whole, uncompressed tar file: {one_line(error)}; a compressed one gives no "
                "random access, so unpack its gzip first"
            ) from None


def _check(member: tarfile.TarInfo, address: str) -> None:
    """Nothing is extracted, but who packs links or paths that lead outside wants something else than training."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{address}: the member {member.name!r} leads outside the archive; pack it anew")
    if not member.isreg() or member.issparse():
        raise InputError(f"{address}: the member {member.name!r} is a link or a device, not a file; pack it anew")


def _key(name: str) -> str:
    """The name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".")[0]


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()
