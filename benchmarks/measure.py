"""Settings of a benchmark, and the time and memory of functions, measured side by side."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from convllava.errors import InputError
from convllava.io import ResumableJsonl
from convllava.model.presets import language_models, towers

Row = dict[str, Any]
"""One line of a report: plain numbers and texts by name."""
Work = Callable[[], Any]
Progress = Callable[[float], None]
"""Takes the share of the work that is done, 0 to 1."""
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Settings:
    """Options of `python -m benchmarks`. A suite ignores those that do not concern it.

    Attributes:
        towers: Names of presets (`convllava info`).
        sides: Sides of square images in pixels, multiples of 64.
        language: Preset of the language model.
        peers: Measure other models or servers too.
        vllm: The Python executable of an environment with vLLM, to measure its server too.
        tokens: Lengths of answers.
        repeats: Number of measurements; the median is reported.
        threads: Threads of one operation.
    """

    towers: Sequence[str] = ("T",)
    sides: Sequence[int] = (768,)
    language: str = "135m"
    peers: bool = False
    vllm: Path | None = None
    tokens: Sequence[int] = (32,)
    repeats: int = 3
    threads: int = 1

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain values for a JSON file."""
        return asdict(self) | {"vllm": self.vllm and str(self.vllm)}

    def check(self) -> None:
        """Raise InputError if a tower or the language model is unknown."""
        for name in self.towers:
            if name not in towers():
                raise InputError(f"there is no tower {name!r}; choose from {', '.join(towers())}")
        if self.language not in language_models():
            known = ", ".join(language_models())
            raise InputError(f"there is no language model {self.language!r}; choose one of {known}")


def side_by_side(
    works: Mapping[Name, Work], repeats: int, journal: ResumableJsonl | None = None, progress: Progress | None = None
) -> dict[Name, float]:
    """Return the median CPU seconds (all threads together) of each function.

    The functions take turns, after one warm-up call of each. CPU time and turns make ratios robust: another process
    that slows the machine for a while slows all functions alike.

    Args:
        works: Functions by name.
        repeats: Number of turns.
        journal: Stores each time; a run that was killed does not repeat the stored ones.
        progress: Called with the share that is done.
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
        seconds[name].append(measure_once(journal, f"{turn} {name}", partial(_cpu_seconds, works[name])))
        progress((len(works) + number) / (len(laps) + len(works)))
    return {name: statistics.median(found) for name, found in seconds.items()}


def measure_once(journal: ResumableJsonl, name: str, measure: Callable[[], float]) -> float:
    """Return the stored value of this name. If there is none yet, measure it and store it."""
    if name not in journal.entries:
        journal.add([{"id": name, "value": measure()}])
    return journal.entries[name]["value"]


def _cpu_seconds(work: Work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def matrix_product() -> tuple[Work, float]:
    """Return a matrix product that is too large for any cache, and its GFLOP: the reference for the speed of the
    machine."""
    rows, inner, columns = 2048, 1024, 4096
    one, other = torch.randn(rows, inner), torch.randn(inner, columns)
    return (lambda: one @ other), 2 * rows * inner * columns / 1e9


def live_memory(work: Work) -> float:
    """Return the most MB that a call holds in torch's allocator at one time: its activations.

    All allocations of torch during the call count; tensors that existed before do not. Resident memory (`peak_memory`)
    is larger: it includes freed memory that the system keeps, and memory of other libraries.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints a line at each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))  # the only public way to get the allocations in order
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda change: change["Ev Idx"])
    return max(accumulate((change["Bytes"] for change in changes), initial=0)) / 1e6


def peak_memory(work: Work) -> float:
    """Return the most MB of resident memory that a call adds.

    Raises:
        InputError: if the system is not Linux.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # psutil cannot reset the peak
    if not reset.exists():
        raise InputError("peak memory can be measured on Linux only; run this suite there")
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide the needs of the call
    reset.write_text("5")  # reset the peak, VmHWM (man 5 proc)

    def kilobytes(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    before = kilobytes("VmRSS")
    work()
    return (kilobytes("VmHWM") - before) * 1024 / 1e6
