"""Where data lie: paths of this machine, and addresses such as s3://bucket/shard.tar, which fsspec opens.

Only what a recipe names is opened; an address inside somebody's data is refused (see `samples.conversation_of`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from convllava.errors import InputError
from convllava.io import one_line

T = TypeVar("T")


def is_remote(address: str) -> bool:
    return "://" in address


def within(folder: str, path: str) -> str:
    """`path` below `folder`; what is absolute stays as it is."""
    if is_remote(path):
        return path
    if is_remote(folder):
        return f"{folder.rstrip('/')}/{path}" if path else folder
    return str(Path(folder) / path)


def exists(address: str) -> bool:
    """Whether there is a file or a folder."""
    return _attempt(address, _exists) if is_remote(address) else Path(address).exists()


def stamp(address: str) -> str:
    """What changes when a file does: its size and time, or what a remote system tells; of a folder, those of its files.
    Of what is no file, as a name of a dataset, nothing."""
    if is_remote(address):
        return _attempt(address, _fingerprint)
    path = Path(address)
    files = sorted(path.rglob("*")) if path.is_dir() else [path][: path.exists()]
    return str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


@contextmanager
def opened(address: str) -> Iterator[BinaryIO]:
    """A binary file that can seek.

    Raises:
        InputError: there is none, or it cannot be opened or read.
    """
    with _attempt(address, _open) as file:
        try:
            yield file
        except OSError as error:
            raise InputError(f"{address} cannot be read: {one_line(error)}") from None


def matches(pattern: str) -> bool:
    """Whether `expand` would find files, all of which are there."""
    return bool(_attempt(pattern, _glob)) if _is_pattern(pattern) else exists(pattern)


def expand(pattern: str) -> list[str]:
    """The files that a path with `*`, `?` or `[...]` names, in the order of their names; a plain one stands for itself.

    Raises:
        InputError: a pattern that no file has.
    """
    if not _is_pattern(pattern):
        return [pattern]
    found = _attempt(pattern, _glob)
    if not found:
        raise InputError(f"no file is named like {pattern}")
    return sorted(found)


def _is_pattern(address: str) -> bool:
    return re.search(r"[*?\[]", address) is not None and not exists(address)


def _attempt(address: str, action: Callable[[str], T]) -> T:
    """What file systems raise becomes one line."""
    try:
        return action(address)
    except FileNotFoundError:
        raise InputError(f"there is no data file {address}") from None
    except ImportError as error:
        raise InputError(f"{address} needs a package: {one_line(error)}") from None
    except Exception as error:  # every remote file system has errors of its own
        raise InputError(f"{address} cannot be read: {one_line(error)}") from None


def _exists(address: str) -> bool:
    system, path = _system(address)
    return system.exists(path)


def _fingerprint(address: str) -> str:
    system, path = _system(address)
    info = system.info(path)  # since of an address of the web, ukey tells the address alone
    return str([system.ukey(path), *(info.get(key) for key in ("size", "ETag", "Last-Modified"))])


def _open(address: str) -> BinaryIO:
    if not is_remote(address):
        return Path(address).open("rb")
    system, path = _system(address)
    return system.open(path, "rb")


def _glob(pattern: str) -> list[str]:
    if is_remote(pattern):
        system, path = _system(pattern)
        return [system.unstrip_protocol(name) for name in system.glob(path)]
    anchor = Path(pattern).anchor
    return [str(path) for path in Path(anchor).glob(pattern.removeprefix(anchor))]


def _system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    from fsspec.core import url_to_fs  # a dependency of torch

    return url_to_fs(address)
