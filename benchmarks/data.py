"""Cost of data before the model sees it: a JPEG file to pixels; records read, checked and encoded for training."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil

from benchmarks.measure import Row, Settings, Work, side_by_side
from convllava import checkpoints
from convllava.data.dataset import FileDataset
from convllava.data.formats import open_records
from convllava.data.formats.tar import CACHE
from convllava.data.mixture import Mixture, MixtureSource
from convllava.data.validation import SourceCheck
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.synthetic import World

PHOTOGRAPH = (4000, 3000)
"""Width and height of the image of the suite `pixels`."""
RECORDS, ROW_GROUP = 3000, 100
PAGES, PAGE_SIDE, JPEG_QUALITY = 40, 1024, 90
PROCESSES = 8
FEW = 60
"""Records that are read in random order, and samples that are checked and encoded."""


def pixels(side: int, settings: Settings) -> list[Row]:
    """Compare a JPEG of 12 megapixels to the tower's pixels with transformers' Pillow processor."""
    photograph = make_photograph(*PHOTOGRAPH)
    ours: Any = ConvLlavaImageProcessorPil(mode="crop", side=side)
    stock: Any = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def decode() -> Image.Image:
        return Image.open(io.BytesIO(photograph)).convert("RGB")

    works: dict[str, Work] = {
        "decode": decode,
        "ours": lambda: ours(photograph)["pixel_values"],
        "stock": lambda: stock(decode(), return_tensors="np")["pixel_values"],
    }
    seconds = side_by_side(works, settings.repeats)
    equal = np.array_equal(np.asarray(works["ours"]()), np.asarray(works["stock"]()))
    return [
        {
            "side": side,
            **{f"{name}_milliseconds": round(1000 * value, 1) for name, value in seconds.items()},
            "ours_over_stock": round(seconds["ours"] / seconds["stock"], 3),
            "equal": bool(equal),
        }
    ]


def make_photograph(width: int, height: int) -> bytes:
    """Return a JPEG with the detail of a photograph: noise at three scales, quality 90."""
    generator = np.random.default_rng(0)
    layers = [
        np.asarray(Image.fromarray(generator.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((width, height)))
        for n in (8, 64, 512)
    ]
    image = Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def data(settings: Settings) -> list[Row]:
    """Measure CPU milliseconds per record with a JPEG page of a megapixel, and microseconds to open the file.

    Records are read in training order by one process (`in_order`), by one of eight processes that share them
    (`one_of_eight`), and in random order (`random`). Samples are checked as by `convllava data check` (`check`) and
    encoded for training (`train`). The file is opened for the first time (`open`) and again (`reopen`).
    """
    world, pages = World("train", seed=0, size=PAGE_SIDE), []
    for number in range(PAGES):
        file = io.BytesIO()
        world.sample(number).image.save(file, "JPEG", quality=JPEG_QUALITY)
        pages.append(file.getvalue())
    before, rows = os.environ.get(CACHE), []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = str(Path(folder) / "cache")
        try:
            for ending, write in _WRITERS.items():
                path = Path(folder) / f"pages{ending}"
                write(path, pages)
                works = _reading_works(path)
                seconds = side_by_side({key: work for key, (work, _) in works.items()}, settings.repeats)
                each = {key: 1000 * seconds[key] / count for key, (_, count) in works.items()}
                rows.append(
                    {
                        "format": ending,
                        "kb": round(sum(map(len, pages)) / len(pages) / 1000),
                        **{f"{key}_ms": round(value, 3) for key, value in each.items() if not key.endswith("open")},
                        **{f"{key}_us": round(1000 * each[key], 1) for key in ("open", "reopen")},
                    }
                )
        finally:
            os.environ.pop(CACHE)
            os.environ |= {} if before is None else {CACHE: before}
    return rows


def _reading_works(path: Path) -> dict[str, tuple[Work, int]]:
    """Return each function to measure with the number of records that it reads."""

    def open_again() -> Any:
        return open_records(path.name, [str(path)])

    def open_first_time() -> None:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)
        open_again()

    def read(items: Any, numbers: Sequence[int]) -> Work:
        def work() -> None:
            for number in numbers:
                items[number]

        return work

    records = open_again()
    mixture = Mixture([MixtureSource(records)])
    order = [mixture[place][1] for place in range(RECORDS)]
    shuffled = np.random.default_rng(0).permutation(RECORDS)[:FEW].tolist()
    processor = checkpoints.processor(checkpoints.find("tiny"))
    return {
        "in_order": (read(records, order), RECORDS),
        "one_of_eight": (read(records, order[::PROCESSES]), len(order[::PROCESSES])),
        "random": (read(records, shuffled), FEW),
        "check": (read(SourceCheck(MixtureSource(records), processor, None, True), range(FEW)), FEW),
        "train": (read(FileDataset(mixture, processor, RECORDS), range(FEW)), FEW),
        "open": (open_first_time, RECORDS),
        "reopen": (open_again, RECORDS),
    }


def _unique_page(pages: list[bytes], number: int) -> bytes:
    """Return one of the pages with a different ending: Parquet would store equal pages once."""
    return pages[number % PAGES] + number.to_bytes(4)


def _write_parquet(path: Path, pages: list[bytes]) -> None:
    import pyarrow.parquet

    rows = [
        {
            "images": [{"bytes": _unique_page(pages, number), "path": None}],
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
            for ending, content in ((".jpg", _unique_page(pages, number)), (".json", text)):
                member = tarfile.TarInfo(f"{number:06}{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


_WRITERS: dict[str, Callable[[Path, list[bytes]], None]] = {".parquet": _write_parquet, ".tar": _write_tar}
