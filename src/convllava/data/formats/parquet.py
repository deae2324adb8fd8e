"""Parquet files with the images inside, read by row groups.

A row cannot be read alone. The training order therefore keeps the rows of a row group together (see `mixture.Mixture`),
and the row groups in use stay in memory. Each process reads whole row groups and uses its share of the rows. A file is
opened again for each row group, because an open file does not survive a fork.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from convllava.data import storage
from convllava.data.formats.base import WINDOW_BYTES, Records, RowGroups, columns_of, record_of
from convllava.errors import DataError
from convllava.io import one_line


class RowGroupCache:
    """The row groups that were used last, shared by all files of a process.

    If all row groups except the largest exceed a number of bytes, the least recently used one is dropped. A window of
    the training order has the same limit, so it never reads a row group twice. The caches of functools and cachetools
    have no limit that leaves out the largest item.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.tables: OrderedDict[tuple[str, int], tuple[int, pyarrow.Table]] = OrderedDict()

    def get(self, key: tuple[str, int], size: int, read: Callable[[], pyarrow.Table]) -> pyarrow.Table:
        """Return the row group `key` of `size` bytes, and read it if it is not in memory."""
        if key not in self.tables:
            self.tables[key] = (size, read())
            while sum(sizes := [size for size, _ in self.tables.values()]) - max(sizes) > self.max_bytes:
                self.tables.popitem(last=False)
        self.tables.move_to_end(key)
        return self.tables[key][1]


_CACHE = RowGroupCache(WINDOW_BYTES)


class ParquetRecords(Records):
    """The rows of a Parquet file.

    Raises:
        DataError: if the file is not Parquet, is damaged, or lacks the columns of `base.record_of`.
    """

    def __init__(self, address: str) -> None:
        self.name = address
        with _open(address) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            self.columns = columns_of(file.schema_arrow.names, address)
        counts = [group.num_rows for group in groups]
        self.length = sum(counts)
        starts = np.cumsum([0, *counts], dtype=np.int64)[:-1]
        self.groups = RowGroups(starts, np.array([group.total_byte_size for group in groups], dtype=np.int64))
        if not self.length:
            raise DataError(f"{address} has no rows")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self.groups.starts, index, side="right")) - 1
        table = _CACHE.get((self.name, group), int(self.groups.sizes[group]), lambda: self._read(group))
        try:
            rows = table.slice(index - int(self.groups.starts[group]), 1).to_pylist()
        except UnicodeDecodeError as error:  # Arrow does not check texts when it reads them
            raise DataError(f"{self.name}: row {index} cannot be read: {one_line(error)}") from None
        if not rows:
            raise DataError(f"{self.name}: row group {group} has fewer rows than the file's metadata says")
        return record_of(rows[0], index)

    @property
    def row_groups(self) -> RowGroups:
        return self.groups

    def _read(self, group: int) -> pyarrow.Table:
        with _open(self.name) as file:
            return file.read_row_group(group, columns=self.columns)


@contextmanager
def _open(address: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    with storage.opened(address) as file:
        try:
            yield pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{address} is not a readable Parquet file: {one_line(error)}") from None
