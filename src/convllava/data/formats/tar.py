"""WebDataset shards: tar files in which the members of one sample share a name up to the first dot.

`0001.json` holds a record in LLaVA's layout, or `0001.txt` a caption; `0001.jpg`, or `0001.0.jpg` and `0001.1.jpg`, are
its images, sorted by name. Opening a file reads all headers once; after that, every sample is read directly from its
position. So a tar file gives random access, and a resumed run does not replay a stream. Nothing is extracted.

The index of a large file is kept in the user's cache, so that not every process reads the headers:

    ~/.cache/convllava/indices/DIGEST.npz    or below CONVLLAVA_CACHE; the digest covers the address, size and time

If the cache cannot be used for any reason, the headers are read as usual.
"""

import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from convllava.data import storage
from convllava.data.collate import CAPTION_REQUESTS
from convllava.data.formats.base import Embedded, PackedJson, Records
from convllava.errors import DataError, InputError
from convllava.io import one_line, replacing

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TEXTS = ("json", "txt")
CACHE = "CONVLLAVA_CACHE"
"""Environment variable with another folder for the cache."""
_CACHED_FROM = 2000
"""Number of samples from which reading the headers takes a noticeable time."""
Member = tuple[str, int, int]
"""Name, offset and size in bytes."""


class TarRecords(Records):
    """The samples of an uncompressed tar file.

    Raises:
        DataError: if the file is not a plain tar file or is cut short, a member is not a regular file or leads outside
            the archive, or there is no text at all.
    """

    def __init__(self, address: str) -> None:
        self.name = address
        path: Path | None = None
        with suppress(OSError, RuntimeError):  # RuntimeError: some containers have users without a home folder
            root = os.environ.get(CACHE) or Path.home() / ".cache" / "convllava"
            place = address if storage.is_remote(address) else str(Path(address).absolute())
            digest = hashlib.sha256(f"{place}\n{storage.stamp(address)}".encode()).hexdigest()[:32]
            path = Path(root) / "indices" / f"{digest}.npz"
        if path is not None:
            with suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile), np.load(path) as arrays:
                self.samples = PackedJson.from_arrays(arrays["ends"], arrays["content"])
                return

        samples: dict[str, list[Member]] = {}
        has_text = False
        for name, offset, size in _members(address):
            if _suffix(name) in (*IMAGES, *TEXTS):
                has_text = has_text or _suffix(name) in TEXTS
                folder, slash, last = name.rpartition("/")
                samples.setdefault(folder + slash + last.split(".")[0], []).append((name, offset, size))
        if not has_text:
            raise DataError(f"{address} has neither KEY.json nor KEY.txt next to its images")
        self.samples = PackedJson(samples.items())
        if path is not None and len(self.samples) >= _CACHED_FROM:
            with suppress(OSError, InputError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path, sync=False) as partial, partial.open("wb") as file:
                    np.savez(file, ends=self.samples.ends, content=self.samples.content)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, members = self.samples[index]
        with storage.opened(self.name) as file:
            contents: dict[str, bytes] = {}
            for name, offset, size in members:
                file.seek(offset)
                contents[name] = file.read(size)
        images = [Embedded(name, contents[name]) for name in sorted(contents) if _suffix(name) in IMAGES]
        record: Any = {}
        for name in [name for name in sorted(contents) if _suffix(name) in TEXTS][:1]:
            try:
                text = contents[name].decode("utf-8")
                if _suffix(name) == "json":
                    record = json.loads(text)
                else:
                    request = CAPTION_REQUESTS[index % len(CAPTION_REQUESTS)]
                    turns = [{"from": "human", "value": request}, {"from": "gpt", "value": text.strip()}]
                    record = {"conversations": turns}
            except ValueError as error:
                raise DataError(f"{name} is not {_suffix(name)}: {one_line(error)}") from None
            if not isinstance(record, dict):
                raise DataError(f"{name} must hold an object with conversations")
        return {"id": key} | record | ({"image": images} if images else {})


def _members(address: str) -> Iterator[Member]:
    """Read the headers of all files in the archive, in their order."""
    with storage.opened(address) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    # Nothing is extracted, but an archive with links or such paths was not made for training.
                    path = PurePosixPath(member.name)
                    if path.is_absolute() or ".." in path.parts:
                        raise DataError(
                            f"{address}: the member {member.name!r} leads outside the archive; pack it again"
                        )
                    if not member.isreg() or member.issparse():
                        raise DataError(
                            f"{address}: the member {member.name!r} is a link or a device, not a file; pack it again"
                        )
                    yield member.name, member.offset_data, member.size
        except (tarfile.TarError, OSError, EOFError, UnicodeError) as error:
            raise DataError(
                f"{address} is not a complete, uncompressed tar file: {one_line(error)}; a compressed file has no "
                "random access, so decompress it first"
            ) from None


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()
