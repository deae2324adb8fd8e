"""Parquet files with the images in them, read by row groups.

A row cannot be read alone, so the training order keeps the rows of a row group together (see `mixture.Mixture`), and
the row groups in use are kept. Every process reads them for itself: of a row group it decodes all rows and uses its own
share. The files are opened anew for each row group, since a handle does not survive a fork.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from convllava.data import storage
from convllava.data.formats.base import WINDOW_BYTES, Blocks, Records, columns_of, record_of
from convllava.errors import InputError
from convllava.io import one_line


class ParquetRecords(Records):
    """The rows of a Parquet file.

    Raises:
        InputError: not Parquet, damaged, or without the columns of `base.record_of`.
    """

    def __init__(self, address: str) -> None:
        self.name = address
        with _parquet(address) as file:
            layout = file.metadata
            groups = [layout.row_group(number) for number in range(layout.num_row_groups)]
            self.columns = columns_of(file.schema_arrow.names, address)
        counts = [group.num_rows for group in groups]
        self.length = sum(counts)
        starts = np.cumsum([0, *counts], dtype=np.int64)[:-1]
        self._blocks = Blocks(starts, np.array([group.total_byte_size for group in groups], dtype=np.int64))
        if not self.length:
            raise InputError(f"{address} has no rows")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._blocks.starts, index, side="right")) - 1
        size = int(self._blocks.sizes[group])
        table = _KEPT.get((self.name, group), size, lambda: self._read(group))
        try:
            rows = table.slice(index - int(self._blocks.starts[group]), 1).to_pylist()
        except UnicodeDecodeError as error:  # Arrow does not look into texts before
            raise InputError(f"{self.name}: row {index} cannot be read: {one_line(error)}") from None
        if not rows:
            raise InputError(f"{self.name}: row group {group} has fewer rows than the file says")
        return record_of(rows[0], index)

    @property
    def blocks(self) -> Blocks:
        return self._blocks

    def _read(self, group: int) -> pyarrow.Table:
        with _parquet(self.name) as file:
            return file.read_row_group(group, columns=self.columns)


@contextmanager
def _parquet(address: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    with storage.opened(address) as file:
        try:
            yield pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{address} is not a readable Parquet file: {one_line(error)}") from None


class _Kept:
    """Row groups by their place, the longest unused given up where those beside the largest exceed a bound.

    A window of the training order (see `mixture`) is held to the same bound, so no row group is read twice in it.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.tables: OrderedDict[tuple[str, int], tuple[int, pyarrow.Table]] = OrderedDict()

    def get(self, key: tuple[str, int], size: int, read: Callable[[], pyarrow.Table]) -> pyarrow.Table:
        if key not in self.tables:
            self.tables[key] = (size, read())
            while self._excess() > 0:
                self.tables.popitem(last=False)
        self.tables.move_to_end(key)
        return self.tables[key][1]

    def _excess(self) -> int:
        sizes = [size for size, _ in self.tables.values()]
        return sum(sizes) - max(sizes) - self.bound


_KEPT = _Kept(WINDOW_BYTES)
