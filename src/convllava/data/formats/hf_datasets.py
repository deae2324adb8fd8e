"""Datasets of the Hugging Face `datasets` package: a folder of `save_to_disk`, or a name for `load_dataset`.

Their Arrow files are mapped into memory, so any row can be read alone.
"""

from typing import Any

import datasets
import pyarrow

from convllava.data.formats.base import Records, columns_of, record_of
from convllava.errors import DataError
from convllava.io import one_line


class TableRecords(Records):
    """The rows of a dataset.

    Args:
        address: Folder of `save_to_disk`, or hub id or folder for `load_dataset`.
        on_disk: Whether it is a folder of `save_to_disk`.
        subset, split: Arguments of `load_dataset`.

    Raises:
        DataError: if there is no such dataset, it holds several splits, or it lacks the columns of `base.record_of`.
    """

    def __init__(self, address: str, on_disk: bool, subset: str | None = None, split: str = "train") -> None:
        self.name = address
        try:
            table: Any = (
                datasets.load_from_disk(address) if on_disk else datasets.load_dataset(address, subset, split=split)
            )
        except Exception as error:  # dataset builders raise many kinds of errors
            raise DataError(f"{address} does not load as a dataset: {one_line(error)}") from None
        if isinstance(table, datasets.DatasetDict):
            raise DataError(f"{address} holds several splits; name the folder of one: {', '.join(table)}")
        # In the format "arrow" images stay bytes, so that they are decoded by the same rules as in other formats.
        self.table = table.select_columns(columns_of(table.column_names, address)).with_format("arrow")
        if not len(self.table):
            raise DataError(f"{address} has no rows")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return record_of(self.table[index].to_pylist()[0], index)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.name}: row {index} cannot be read: {one_line(error)}") from None
