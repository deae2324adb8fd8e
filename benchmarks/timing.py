"""Time and memory of functions, side by side."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from convllava.errors import InputError
from convllava.io import ResumableJsonl

Work = Callable[[], Any]
Progress = Callable[[float], None]
Name = TypeVar("Name", bound=Hashable)


def side_by_side(
    works: Mapping[Name, Work], repeats: int, journal: ResumableJsonl | None = None, progress: Progress | None = None
) -> dict[Name, float]:
    """Median CPU seconds (of all threads together) of each, called in turns after one call that does not count.

    CPU time and turns, because other processes come and go: a ratio of two medians is then of the two works, and not of
    two moments.

    Args:
        works: By name.
        repeats: Turns.
        journal: Where each time is kept; what a run that was killed has taken already is not taken again.
        progress: Told the share that is done.
    """
    journal, progress = journal or ResumableJsonl(None, {}), progress or (lambda share: None)
    laps = [(turn, name) for turn in range(repeats) for name in works]
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    missing = {name for turn, name in laps if f"{turn} {name}" not in journal.entries}
    for number, name in enumerate(works):
        if name in missing:
            works[name]()
        progress(number / (len(laps) + len(works)))
    for number, (turn, name) in enumerate(laps, start=1):
        seconds[name].append(kept(journal, f"{turn} {name}", partial(_seconds, works[name])))
        progress((len(works) + number) / (len(laps) + len(works)))
    return {name: statistics.median(found) for name, found in seconds.items()}


def kept(journal: ResumableJsonl, name: str, measure: Callable[[], float]) -> float:
    """What the journal has under this name, or else what is measured, which it then has."""
    if name not in journal.entries:
        journal.add([{"id": name, "value": measure()}])
    return journal.entries[name]["value"]


def _seconds(work: Work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def matrix_product() -> tuple[Work, float]:
    """The yardstick: a product of matrices that no cache holds, and its GFLOP."""
    rows, inner, columns = 2048, 1024, 4096
    one, other = torch.randn(rows, inner), torch.randn(inner, columns)
    return (lambda: one @ other), 2 * rows * inner * columns / 1e9


def live_memory(work: Work) -> float:
    """MB of tensors, and of what operations allocate within, that a call holds at its highest point: its activations.

    Every call of torch's allocator is counted, and what was there before is not. Resident memory (`peak_memory`) is
    more by what the system keeps for the next time, and by what libraries take past torch.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of each start and stop amid the bar
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))  # the only public way to the allocations in their order
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda change: change["Ev Idx"])
    return max(accumulate((change["Bytes"] for change in changes), initial=0)) / 1e6


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
