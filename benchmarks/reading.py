"""What data cost before they reach the model: reading a record, checking a sample, and encoding it for training."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Work, side_by_side
from convllava import checkpoints
from convllava.data.dataset import FileDataset
from convllava.data.formats import Records, open_records
from convllava.data.formats.tar_index import CACHE
from convllava.data.mixture import Mixture, Part
from convllava.data.validation import Examination
from convllava.synthetic import World

RECORDS, ROW_GROUP = 3000, 100
_PAGES, _SIDE, _QUALITY = 40, 1024, 90
_EIGHTH = 8
_FEW = 60
"""Records that are read at random, and samples that are checked and encoded."""


def reading(repeats: int) -> Iterator[dict[str, Any]]:
    """Records with a JPEG page of a megapixel inside: CPU milliseconds each, and microseconds a record to open a file
    for the first time and again.

    In the training's order by one process, by one of eight processes, which read an eighth each, and with rows drawn
    freely; then samples as `convllava data check` looks at them and as training gets them.
    """
    pages = _jpegs()
    with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder) / "cache"):
        for name, write in _WRITERS.items():
            path = Path(folder) / f"pages{name}"
            write(path, pages)
            records = open_records(path.name, [str(path)])
            works = _works(records, lambda path=path: open_records(path.name, [str(path)]))  # type: ignore[misc]  # mypy does not infer it
            seconds = side_by_side({key: work for key, (work, _) in works.items()}, repeats)
            each = {key: 1000 * seconds[key] / count for key, (_, count) in works.items()}
            yield {
                "format": name,
                "kb": round(sum(map(len, pages)) / len(pages) / 1000),
                **{f"{key}_ms": round(value, 3) for key, value in each.items() if not key.endswith("open")},
                **{f"{key}_us": round(1000 * each[key], 1) for key in ("open", "reopen")},
            }


def _works(records: Records, opening: Work) -> dict[str, tuple[Work, int]]:
    """Each work, and how many records it reads."""
    mixture = Mixture([Part(records)])
    order = [mixture[place][1] for place in range(RECORDS)]
    free = np.random.default_rng(0).permutation(RECORDS)[:_FEW].tolist()
    processor = checkpoints.processor(checkpoints.find("tiny"))
    examination = Examination(Part(records), processor, None, True)
    training = FileDataset(mixture, processor, RECORDS)
    few = range(_FEW)
    return {
        "in_order": (_getting(records, order), RECORDS),
        "one_of_eight": (_getting(records, order[::_EIGHTH]), len(order[::_EIGHTH])),
        "free": (_getting(records, free), _FEW),
        "check": (_getting(examination, few), _FEW),
        "train": (_getting(training, few), _FEW),
        "open": (_afresh(opening), RECORDS),
        "reopen": (opening, RECORDS),
    }


def _afresh(opening: Work) -> Work:
    def work() -> None:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)
        opening()

    return work


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(CACHE)
        os.environ |= {} if before is None else {CACHE: before}


def _getting(items: Any, numbers: Sequence[int]) -> Work:
    def work() -> None:
        for number in numbers:
            items[number]

    return work


def _jpegs() -> list[bytes]:
    world, found = World("train", seed=0, size=_SIDE), []
    for number in range(_PAGES):
        file = io.BytesIO()
        world.sample(number).image.save(file, "JPEG", quality=_QUALITY)
        found.append(file.getvalue())
    return found


def _page(pages: list[bytes], number: int) -> bytes:
    """One of the pages, with an end of its own: Parquet would keep equal ones once."""
    return pages[number % _PAGES] + number.to_bytes(4)


def _write_parquet(path: Path, pages: list[bytes]) -> None:
    import pyarrow.parquet

    rows = [
        {
            "images": [{"bytes": _page(pages, number), "path": None}],
            "texts": [{"user": "What is it?", "assistant": "A"}],
        }
        for number in range(RECORDS)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=ROW_GROUP)


def _write_tar(path: Path, pages: list[bytes]) -> None:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A"}]
    text = json.dumps({"conversations": turns}).encode()
    with tarfile.open(path, "w") as archive:
        for number in range(RECORDS):
            for ending, content in ((".jpg", _page(pages, number)), (".json", text)):
                member = tarfile.TarInfo(f"{number:06}{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


_WRITERS: dict[str, Callable[[Path, list[bytes]], None]] = {".parquet": _write_parquet, ".tar": _write_tar}
