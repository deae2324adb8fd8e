"""Addresses of data: paths on this machine, and addresses such as s3://bucket/shard.tar, which fsspec opens.

Only the addresses in a recipe are opened. An address inside the data is rejected (see `records.conversation_of`).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from convllava.errors import DataError
from convllava.io import one_line

T = TypeVar("T")


def is_remote(address: str) -> bool:
    """Return whether fsspec is needed to open the address."""
    return "://" in address


def within(folder: str, path: str) -> str:
    """Join a folder and a path. An absolute path or address stays as it is."""
    if is_remote(path):
        return path
    if is_remote(folder):
        return f"{folder.rstrip('/')}/{path}" if path else folder
    return str(Path(folder) / path)


def exists(address: str) -> bool:
    """Return whether there is a file or a folder.

    Raises:
        DataError: if the remote file system does not answer.
    """
    if not is_remote(address):
        return Path(address).exists()
    system, path = _file_system(address)
    return _with_errors(address, lambda: system.exists(path))


def stamp(address: str) -> str:
    """Return a text that changes when a file changes.

    It holds the size and modification time of the file (of all files, for a folder), or the identity that a remote
    file system reports. It is empty for the name of a dataset, which is not a file.
    """
    if not is_remote(address):
        path = Path(address)
        files = sorted(path.rglob("*")) if path.is_dir() else [path][: path.exists()]
        return str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])

    system, path_there = _file_system(address)

    def identity() -> str:
        info = system.info(path_there)  # the ukey of a web address is made of the address alone
        return str([system.ukey(path_there), *(info.get(key) for key in ("size", "ETag", "Last-Modified"))])

    return _with_errors(address, identity)


@contextmanager
def opened(address: str) -> Iterator[BinaryIO]:
    """Open a binary file that can seek.

    Raises:
        DataError: if the file does not exist or cannot be read.
    """
    system, path = _file_system(address) if is_remote(address) else (None, address)
    with _with_errors(address, lambda: Path(path).open("rb") if system is None else system.open(path, "rb")) as file:
        try:
            yield file
        except OSError as error:
            raise DataError(f"{address} cannot be read: {one_line(error)}") from None


def matches(pattern: str) -> bool:
    """Return whether `expand` would find files that exist."""
    return bool(_glob(pattern)) if _is_pattern(pattern) else exists(pattern)


def expand(pattern: str) -> list[str]:
    """Return the files that match a path with `*`, `?` or `[...]`, sorted by name; or a plain path itself.

    Raises:
        DataError: if no file matches the pattern.
    """
    if not _is_pattern(pattern):
        return [pattern]
    found = _glob(pattern)
    if not found:
        raise DataError(f"no file matches {pattern}")
    return sorted(found)


def _is_pattern(address: str) -> bool:
    return re.search(r"[*?\[]", address) is not None and not exists(address)


def _glob(pattern: str) -> list[str]:
    if is_remote(pattern):
        system, path = _file_system(pattern)
        return _with_errors(pattern, lambda: [system.unstrip_protocol(name) for name in system.glob(path)])
    anchor = Path(pattern).anchor
    return [str(path) for path in Path(anchor).glob(pattern.removeprefix(anchor))]


def _file_system(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it."""
    from fsspec.core import url_to_fs  # a dependency of torch

    return _with_errors(address, lambda: url_to_fs(address))


def _with_errors(address: str, action: Callable[[], T]) -> T:
    """Run a file system call and turn its errors into one line."""
    try:
        return action()
    except FileNotFoundError:
        raise DataError(f"there is no data file {address}") from None
    except ImportError as error:
        raise DataError(f"{address} needs a package: {one_line(error)}") from None
    except Exception as error:  # each remote file system has its own errors
        raise DataError(f"{address} cannot be read: {one_line(error)}") from None
