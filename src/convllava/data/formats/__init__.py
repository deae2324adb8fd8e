"""Data files of every format, found by their name: one module each, all of which give `base.Records`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from convllava.data import Format, storage
from convllava.data.formats.base import Blocks, Embedded, Records, Shards
from convllava.data.formats.json_files import TextRecords
from convllava.data.formats.tar import TarRecords
from convllava.errors import InputError

__all__ = ["Blocks", "Embedded", "Records", "open_records"]

_ENDINGS: dict[str, Format] = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_MANY = 20
"""So many files are opened behind a progress bar."""
_SAVED = ("state.json", "dataset_dict.json")
"""Files by which a folder of `save_to_disk` is known."""


def open_records(
    name: str,
    patterns: Sequence[str],
    *,
    kind: Format | None = None,
    limit: int | None = None,
    subset: str | None = None,
    split: str = "train",
) -> Records:
    """The records of one source.

    Args:
        name: What reports call it.
        patterns: Paths or addresses, in which `*`, `?` and `[...]` name several files.
        kind: None: by the name.
        limit: Take so many from the beginning.
        subset, split: Of a name for `datasets.load_dataset`.

    Raises:
        InputError: a file that is missing, damaged or of no known format; a package that is not installed.
    """
    files = [file for pattern in patterns for file in storage.expand(pattern)]
    # A tar file's headers are all read, which takes a while where there are many.
    console = Console(stderr=True)
    watched = track(files, f"opening {name}", console=console, transient=True, disable=len(files) < _MANY)
    return Shards(name, [_open(file, kind or format_of(file), subset, split) for file in watched], limit)


def format_of(address: str) -> Format:
    """The format that a file's name, or a folder's content, tells of.

    Raises:
        InputError: they tell of none.
    """
    ending = Path(address).suffix.lower()
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if not is_saved(address):
        raise InputError(
            f"{address} is of no known format: {', '.join(_ENDINGS)}, or a folder of datasets' save_to_disk; "
            "name another file's with format: json, parquet, webdataset or datasets"
        )
    return "datasets"


def is_saved(address: str) -> bool:
    """Whether this is a folder that `datasets` wrote with `save_to_disk`."""
    return any(storage.exists(storage.within(address, name)) for name in _SAVED)


def _open(address: str, kind: Format, subset: str | None, split: str) -> Records:
    try:
        if kind == "parquet":
            from convllava.data.formats.parquet import ParquetRecords

            return ParquetRecords(address)
        if kind == "datasets":
            from convllava.data.formats.hf_datasets import TableRecords

            return TableRecords(address, is_saved(address), subset, split)
    except ImportError as error:
        raise InputError(f"{address}: data of this format need {error.name}; pip install 'convllava[data]'") from None
    return TarRecords(address) if kind == "webdataset" else TextRecords(address)
