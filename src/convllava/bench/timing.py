"""Time and memory of functions, side by side."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from convllava.errors import InputError

Work = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


def side_by_side(works: Mapping[Name, Work], repeats: int) -> dict[Name, float]:
    """Median CPU seconds (of all threads together) of each, called in turns after one call that does not count.

    CPU time and turns, because other processes come and go: a ratio of two medians is then of the two works, and not of
    two moments.
    """
    for work in works.values():
        work()
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def matrix_product() -> tuple[Work, float]:
    """The yardstick: a product of matrices that no cache holds, and its GFLOP."""
    rows, inner, columns = 2048, 1024, 4096
    one, other = torch.randn(rows, inner), torch.randn(inner, columns)
    return (lambda: one @ other), 2 * rows * inner * columns / 1e9


def peak_memory(work: Work) -> float:
    """MB of resident memory that a call adds at its highest point.

    Raises:
        InputError: the system does not tell (only Linux does).
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        raise InputError("peak memory can be measured on Linux only")
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free, but kept, would hide what the work needs
    reset.write_text("5")  # the high-water mark begins anew (man 5 proc)
    before = _kilobytes(status, "VmRSS")
    work()
    return (_kilobytes(status, "VmHWM") - before) * 1024 / 1e6


def _kilobytes(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))
