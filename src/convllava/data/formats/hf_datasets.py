"""Hugging Face `datasets`: a folder that `save_to_disk` wrote, or what `load_dataset` finds under a name.

Their Arrow files are mapped into memory, and any row is as near as any other.
"""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow

from convllava.data.formats.base import Records, columns_of, record_of
from convllava.errors import InputError
from convllava.io import one_line


class TableRecords(Records):
    """The rows of a dataset.

    Args:
        address: Folder of `save_to_disk`, hub id, or what else `load_dataset` takes.
        on_disk: Whether it is such a folder.
        subset, split: Of a name for `load_dataset`.

    Raises:
        InputError: there is none, it holds several splits, or it has not the columns of `base.record_of`.
    """

    def __init__(self, address: str, on_disk: bool, subset: str | None = None, split: str = "train") -> None:
        self.name = address
        table = _loaded(address, on_disk, subset, split)
        columns = columns_of(table.column_names, address)
        # As Arrow, so that images stay bytes, which our own rules decode.
        self.table = table.select_columns(columns).with_format("arrow")
        if not len(self.table):
            raise InputError(f"{address} has no rows")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return record_of(self.table[index].to_pylist()[0], index)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.name}: row {index} cannot be read: {one_line(error)}") from None


def _loaded(address: str, on_disk: bool, subset: str | None, split: str) -> Any:
    try:
        table = datasets.load_from_disk(address) if on_disk else datasets.load_dataset(address, subset, split=split)
    except Exception as error:  # builders raise nearly anything
        raise InputError(f"{address} does not load as a dataset: {one_line(error)}") from None
    if isinstance(table, datasets.DatasetDict):
        raise InputError(f"{address} holds several splits; name the folder of one: {', '.join(table)}")
    return table
