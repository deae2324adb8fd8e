"""Indices of tar files kept in the user's cache, so that a file's headers are read once and not by every process.

    ~/.cache/convllava/indices/DIGEST.npz    or below CONVLLAVA_CACHE; the digest is of the address, size and time

Whatever is wrong with the cache, as where it cannot be written, the headers are read as without it.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from convllava.data import storage
from convllava.data.formats.base import Packed
from convllava.errors import InputError
from convllava.io import replacing

CACHE = "CONVLLAVA_CACHE"
"""The environment variable that names another folder."""
_WORTH = 2000
"""Samples from which on reading the headers takes longer than one notices."""
_NO_CACHE = (OSError, RuntimeError)
"""The second of a user without a home, as in some containers."""


def kept(address: str) -> Packed | None:
    """The index of a file that has not changed since it was kept; None where there is none.

    Raises:
        InputError: there is no such file.
    """
    try:
        with np.load(_path(address), allow_pickle=False) as arrays:
            return Packed.of_arrays(arrays["ends"], arrays["content"])
    except (*_NO_CACHE, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def keep(address: str, index: Packed) -> None:
    """Keep the index of a file that has many samples."""
    if len(index) < _WORTH:
        return
    with suppress(*_NO_CACHE, InputError):
        path = _path(address)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as partial, partial.open("wb") as file:
            np.savez(file, ends=index.ends, content=index.content)


def _path(address: str) -> Path:
    root = os.environ.get(CACHE) or Path.home() / ".cache" / "convllava"
    place = address if storage.is_remote(address) else str(Path(address).absolute())
    digest = hashlib.sha256(f"{place}\n{storage.stamp(address)}".encode()).hexdigest()[:32]
    return Path(root) / "indices" / f"{digest}.npz"
