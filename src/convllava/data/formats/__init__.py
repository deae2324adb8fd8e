"""Readers of data files. The file's name selects the format; all readers are `base.Records`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from convllava.data import Format, storage
from convllava.data.formats.base import Embedded, Records, RowGroups, Shards
from convllava.data.formats.json_files import JsonRecords
from convllava.data.formats.tar import TarRecords
from convllava.errors import DataError

__all__ = ["Embedded", "Records", "RowGroups", "open_records"]

_FORMATS: dict[str, Format] = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "webdataset"}
_PROGRESS_FROM = 20
"""Number of files from which a progress bar is shown. Opening a tar file reads all its headers."""


def open_records(
    name: str,
    patterns: Sequence[str],
    *,
    kind: Format | None = None,
    limit: int | None = None,
    subset: str | None = None,
    split: str = "train",
) -> Records:
    """Open all files of one source as one list of records.

    Args:
        name: Name of the source in reports.
        patterns: Paths or addresses. `*`, `?` and `[...]` match several files.
        kind: The format; None finds it by the name of each file.
        limit: Take only the first records.
        subset, split: Arguments of `datasets.load_dataset`, for the format "datasets".

    Raises:
        DataError: if a file is missing, damaged or of an unknown format, or a package is not installed.
    """
    files = [file for pattern in patterns for file in storage.expand(pattern)]
    console = Console(stderr=True)
    tracked = track(files, f"opening {name}", console=console, transient=True, disable=len(files) < _PROGRESS_FROM)
    return Shards(name, [_open(file, kind, subset, split) for file in tracked], limit)


def _open(address: str, kind: Format | None, subset: str | None, split: str) -> Records:
    kind = kind or _FORMATS.get(Path(address).suffix.lower())
    is_saved = kind in (None, "datasets") and any(
        storage.exists(storage.within(address, name)) for name in ("state.json", "dataset_dict.json")
    )  # a folder of save_to_disk has one of these files
    if kind is None and is_saved:
        kind = "datasets"
    if kind is None:
        raise DataError(
            f"{address} is of no known format: {', '.join(_FORMATS)}, or a folder of datasets' save_to_disk; "
            "for another file name set `format`: json, parquet, webdataset or datasets"
        )
    try:
        if kind == "parquet":
            from convllava.data.formats.parquet import ParquetRecords

            return ParquetRecords(address)
        if kind == "datasets":
            from convllava.data.formats.hf_datasets import TableRecords

            return TableRecords(address, is_saved, subset, split)
    except ImportError as error:
        raise DataError(f"{address}: this format needs {error.name}; run pip install 'convllava[data]'") from None
    return TarRecords(address) if kind == "webdataset" else JsonRecords(address)
