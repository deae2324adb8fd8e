"""The same conversations in data files of every format, for the tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from conftest import fresh, picture
from datasets import Dataset
from training_runs import SMALLEST

from convllava.data.formats import Records, open_records
from convllava.training.datasets import make_dataset
from convllava.training.recipe import Data, Recipe, Source, Stage
from convllava.training.stage import StageRun

SHAPES = {"a.png": (70, 130), "b.png": (64, 64), "c.png": (150, 90)}
TALKS: list[tuple[list[str], list[tuple[str, str]]]] = [
    (["a.png"], [("<image>\nwhat is it?", "red"), ("and the total?", "7")]),
    (["b.png", "a.png"], [("<image> or <image>: which?", "the top")]),
    ([], [("hello", "what is the total?")]),
    (["c.png"], [("describe", "left")]),
    (["b.png"], [("<image>what?", "Größe")]),
]
"""For each sample its images, and its turns of user and assistant."""
FILES = (
    "data.jsonl",
    "onevision.parquet",
    "finevision.parquet",
    "data.tar",
    "saved",
    "shard-*.tar",
    ["piece-0.parquet", "piece-1.parquet"],
)


def png(name: str) -> bytes:
    file = io.BytesIO()
    picture(*SHAPES[name], seed=len(name) + ord(name[0])).save(file, "PNG")
    return file.getvalue()


def conversations(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": text} for pair in turns for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]


def records() -> list[dict[str, Any]]:
    return [
        {"id": f"s{number}", "image": images, "conversations": conversations(turns)}
        for number, (images, turns) in enumerate(TALKS)
    ]


def write_json(path: Path) -> None:
    lines = map(json.dumps, records())
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else "[" + ",".join(lines) + "]")


def onevision() -> pyarrow.Table:
    """Return LLaVA-OneVision's columns. It has one image a row; lists of images are our extension."""
    rows = [
        {"id": record["id"], "images": [{"bytes": png(name), "path": name} for name in record["image"]]}
        | {"conversations": record["conversations"], "data_source": "drawn"}
        for record in records()
    ]
    return pyarrow.Table.from_pylist(rows)


def finevision() -> pyarrow.Table:
    rows = [
        {
            "images": [{"bytes": png(name), "path": None} for name in images],
            "texts": [{"user": user, "assistant": assistant} for user, assistant in turns],
            "source": "drawn",
        }
        for images, turns in TALKS
    ]
    return pyarrow.Table.from_pylist(rows)


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def members() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number, record in enumerate(records()):
        found[f"part/{number:04}.json"] = json.dumps({**record, "image": None}).encode()
        found |= {f"part/{number:04}.{place}.png": png(name) for place, name in enumerate(record["image"])}
    return found


def write_all(home: Path) -> Path:
    """Write the same records in all of `FILES`, and in data.json with the images next to it."""
    (home / "images").mkdir()
    for name in SHAPES:
        (home / "images" / name).write_bytes(png(name))
    write_json(home / "data.json")
    write_json(home / "data.jsonl")
    write_parquet(home / "onevision.parquet", onevision())
    write_parquet(home / "finevision.parquet", finevision())
    write_tar(home / "data.tar", members())
    Dataset(onevision()).save_to_disk(home / "saved")
    rows = list(members().items())
    cut = next(number for number, (name, _) in enumerate(rows) if name.startswith("part/0003"))
    write_tar(home / "shard-0.tar", dict(rows[:cut]))
    write_tar(home / "shard-1.tar", dict(rows[cut:]))
    write_parquet(home / "piece-0.parquet", finevision().slice(0, 3))
    write_parquet(home / "piece-1.parquet", finevision().slice(3))
    return home


def recipe(root: str | Path, *sources: Source, steps: int | None = None, **data: Any) -> Recipe:
    stage = Stage(
        "files",
        steps,
        {"projector": 1e-3},
        Data(sources=list(sources), max_skipped=0.5, **data),
        epochs=None if steps else 1,
        batch_size=1,
    )
    return Recipe("files", [stage], SMALLEST, data_root=str(root), workers=0)


def open_one(path: Path) -> Records:
    return open_records(path.name, [str(path)])


def items_of(plan: Recipe, count: int = 5) -> list[dict[str, torch.Tensor]]:
    dataset = make_dataset(StageRun(plan, 0, fresh()[1]))
    return [dataset[index] for index in range(count)]


def in_file_order(plan: Recipe) -> list[dict[str, torch.Tensor]]:
    dataset: Any = make_dataset(StageRun(plan, 0, fresh()[1]))
    return [dataset.item(dataset.sample(0, number)) for number in range(len(dataset.mixture.sources[0].records))]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
