"""The same samples in files of every format, near and far: what training sees of them is the same."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import fresh, picture
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from killing import killed_after
from PIL import Image

from convllava.data import storage
from convllava.data.conversation import SKIPPED
from convllava.data.formats import Blocks, Records, indices, open_records, parquet, tar
from convllava.data.formats.base import record_of
from convllava.data.mixture import Mixture, Part
from convllava.data.samples import SampleError, conversation_of
from convllava.data.sources import FileDataset
from convllava.errors import InputError
from convllava.training import engine
from convllava.training.inputs import make_dataset
from convllava.training.plan import plan
from convllava.training.recipe import Data, ModelSpec, Recipe, Source, Stage, load_recipe

SHAPES = {"a.png": (70, 130), "b.png": (64, 64), "c.png": (150, 90)}
TALKS: list[tuple[list[str], list[tuple[str, str]]]] = [
    (["a.png"], [("<image>\nwhat is it?", "red"), ("and the total?", "7")]),
    (["b.png", "a.png"], [("<image> or <image>: which?", "the top")]),
    ([], [("hello", "what is the total?")]),
    (["c.png"], [("describe", "left")]),
    (["b.png"], [("<image>what?", "Größe")]),
]
"""Images, and turns of user and assistant."""


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
    """One image a row is the rule there; a list is our extension."""
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


def write_parquet(path: Path, table: pyarrow.Table, rows: int = 2) -> None:
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("data")
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


@pytest.fixture(scope="module")
def far(folder) -> str:
    """The same files at memory://."""
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/far/{path.relative_to(folder)}", path.read_bytes())
    return "memory://far"


def recipe(root: str | Path, *sources: Source, steps: int | None = None, **data: Any) -> Recipe:
    stage = Stage(
        "files",
        steps,
        {"projector": 1e-3},
        Data(sources=list(sources), max_skipped=0.5, **data),
        epochs=None if steps else 1,
        batch_size=1,
    )
    model = ModelSpec(
        vision={"depths": [1] * 5, "hidden_sizes": [8] * 5},
        language={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        pixels={"min_pixels": 64 * 64, "max_pixels": 128 * 128},
    )
    return Recipe("files", [stage], model, data_root=str(root), workers=0)


def items_of(plan: Recipe, count: int = 5) -> list[dict[str, torch.Tensor]]:
    dataset = make_dataset(plan, 0, fresh()[1])
    return [dataset[index] for index in range(count)]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def in_file_order(plan: Recipe) -> list[dict[str, torch.Tensor]]:
    dataset: Any = make_dataset(plan, 0, fresh()[1])
    return [dataset.item(dataset.sample(0, number)) for number in range(len(dataset.mixture.parts[0].records))]


KEYS = st.sampled_from(
    ["id", "image", "images", "conversations", "texts", "from", "value", "user", "assistant", "bytes", "path"]
)
FILES = (
    "data.jsonl",
    "onevision.parquet",
    "finevision.parquet",
    "data.tar",
    "saved",
    "shard-*.tar",
    ["piece-0.parquet", "piece-1.parquet"],
)


@pytest.mark.parametrize("path", FILES, ids=str)
@pytest.mark.parametrize("place", ["folder", "far"])
def test_every_format_gives_the_same_items(request, place, path, folder):
    root = request.getfixturevalue(place)
    expected = in_file_order(recipe(folder, Source("data.json", "images"), steps=1))
    found = in_file_order(recipe(root, Source(path, "images"), steps=1))
    assert len(found) == len(TALKS)
    assert all(map(same, found, expected))


@pytest.mark.parametrize("path", ["data.jsonl", "data.tar", "saved"])
def test_formats_with_random_access_come_in_the_same_order(folder, path):
    expected = items_of(recipe(folder, Source("data.json", "images"), steps=9), 9)
    assert all(map(same, items_of(recipe(folder, Source(path, "images"), steps=9), 9), expected))


def test_a_name_goes_to_load_dataset(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "local").mkdir()
    write_parquet(tmp_path / "local" / "train.parquet", onevision())
    found = in_file_order(recipe(tmp_path, Source("local", format="datasets"), steps=1))
    assert all(map(same, found, in_file_order(recipe(folder, Source("data.json", "images"), steps=1))))
    with pytest.raises(InputError, match="local does not load as a dataset"):
        make_dataset(recipe(tmp_path, Source("local", format="datasets", split="gone"), steps=1), 0, fresh()[1])


def test_a_caption_answers_a_request(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": png("a.png"), "1.txt": b"a red top\n", "1.cls": b"7"})
    record = open_records("a.tar", [str(tmp_path / "a.tar")])[0]
    assert record["id"] == "1"
    assert [turn["value"] for turn in record["conversations"]] == ["Describe the image.", "a red top"]
    assert record["image"][0].content == png("a.png")


def test_members_of_a_sample_may_lie_apart(tmp_path, folder):
    apart = sorted(members().items(), key=lambda member: member[0].endswith("json"))
    write_tar(tmp_path / "apart.tar", dict(apart))
    found, expected = open_one(tmp_path / "apart.tar"), open_one(folder / "data.tar")
    texts = {found[number]["id"]: found[number] for number in range(len(found))}
    assert texts == {expected[number]["id"]: expected[number] for number in range(len(expected))}


def test_the_headers_of_a_large_tar_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv(indices.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(indices, "_WORTH", 3)
    write_tar(tmp_path / "a.tar", members())
    whole = open_one(tmp_path / "a.tar")
    read = []
    monkeypatch.setattr(tar, "_members", lambda address: read.append(address) or iter([("0.txt", 0, 1)]))
    again = open_one(tmp_path / "a.tar")
    assert [again[number] for number in range(len(whole))] == [whole[number] for number in range(len(whole))]
    assert not read
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    for damaged in (b"", kept.read_bytes()[:100]):
        kept.write_bytes(damaged)
        assert len(open_one(tmp_path / "a.tar")) == 1
    monkeypatch.undo()
    monkeypatch.setenv(indices.CACHE, str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", {"1.txt": b"another"})
    assert len(open_one(tmp_path / "a.tar")) == 1


def test_an_index_that_cannot_be_kept_is_read_again(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv(indices.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(indices, "_WORTH", 1)
    write_tar(tmp_path / "a.tar", members())
    assert len(open_one(tmp_path / "a.tar")) == len(open_one(tmp_path / "a.tar")) == 5


def test_a_user_without_a_home_reads_tar_files_all_the_same(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(indices.CACHE, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(indices, "_WORTH", 1)
    write_tar(tmp_path / "a.tar", members())
    assert len(open_one(tmp_path / "a.tar")) == 5


def test_a_file_that_vanishes_while_it_is_read_is_named(tmp_path):
    for name in ("data.tar", "finevision.parquet"):
        path = tmp_path / name
        write_tar(path, members()) if name == "data.tar" else write_parquet(path, finevision())
        found = open_one(path)
        path.unlink()
        with pytest.raises(InputError, match=f"there is no data file .*{name}"):
            found[0]


def test_a_limit_takes_the_first_of_all_shards(folder):
    pieces = [str(folder / f"piece-{number}.parquet") for number in (0, 1)]
    whole, some = open_records("pieces", pieces), open_records("pieces", pieces, limit=4)
    assert (len(whole), len(some)) == (5, 4)
    assert [some[number] for number in range(4)] == [whole[number] for number in range(4)]
    assert whole.blocks is not None
    assert some.blocks is not None
    assert whole.blocks.starts.tolist() == [0, 2, 3]
    assert open_records("pieces", pieces, limit=2).blocks.starts.tolist() == [0]  # type: ignore[union-attr]


def test_row_groups_are_read_once_each_in_an_epoch(tmp_path, monkeypatch):
    """Windows of two row groups, so that what is kept and what is mixed must fit each other."""
    table = pyarrow.Table.from_pylist([{"texts": [{"user": f"q{n}", "assistant": "x" * 5000}]} for n in range(60)])
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", row_group_size=6, compression="none", use_dictionary=False
    )
    found = open_records("a.parquet", [str(tmp_path / "a.parquet")])
    assert found.blocks is not None
    bound = 2 * int(found.blocks.sizes.max())
    monkeypatch.setattr("convllava.data.mixture.WINDOW_BYTES", bound)
    monkeypatch.setattr(parquet, "_KEPT", parquet._Kept(bound))
    read: list[int] = []
    original = parquet.ParquetRecords._read
    monkeypatch.setattr(
        parquet.ParquetRecords, "_read", lambda self, group: (read.append(group), original(self, group))[1]
    )
    mixture = Mixture([Part(found)])
    order = [mixture[place][1] for place in range(60)]
    assert {found[number]["conversations"][0]["value"] for number in order} == {f"q{n}" for n in range(60)}
    assert sorted(read) == list(range(10))
    assert read != sorted(read)
    assert any(abs(a - b) > 6 for a, b in itertools.pairwise(order))


class Numbered(Records):
    """As many records as asked, in blocks of a size if any."""

    name = "numbered"

    def __init__(self, length: int, block: int | None) -> None:
        self.length, self.block = length, block

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index}

    @property
    def blocks(self) -> Blocks | None:
        if self.block is None:
            return None
        starts = np.arange(0, self.length, self.block, dtype=np.int64)
        return Blocks(starts, np.full(len(starts), 60 * 2**20, dtype=np.int64))


SOURCES = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0.2, 3), st.none() | st.integers(1, 4)), min_size=1, max_size=4
)


@given(SOURCES, st.integers(0, 2))
def test_a_mixture_repeats_each_source_as_often_as_it_says(sources, epoch):
    parts = [Part(Numbered(length, block), repeat=repeat) for length, repeat, block in sources]
    expected = [round(length * repeat) for length, repeat, _ in sources]
    if not sum(expected):
        with pytest.raises(InputError, match="has no sample; raise repeat or limit"):
            Mixture(parts)
        return
    mixture = Mixture(parts)
    drawn = [mixture[epoch * len(mixture) + index] for index in range(len(mixture))]
    assert Counter(source for source, _ in drawn) == {i: n for i, n in enumerate(expected) if n}
    for source, (length, *_) in enumerate(sources):
        counts = Counter(number for own, number in drawn if own == source)
        assert max(counts.values(), default=0) - min((counts[n] for n in range(length)), default=0) <= 1


@given(SOURCES)
def test_weights_share_an_epoch_and_leave_no_record_out(sources):
    parts = [Part(Numbered(length, block), weight=weight) for length, weight, block in sources]
    whole, weights = sum(length for length, *_ in sources), sum(weight for _, weight, _ in sources)
    mixture = Mixture(parts)
    taken = Counter(mixture[index][0] for index in range(len(mixture)))
    for source, (_, weight, _) in enumerate(sources):
        assert taken[source] == pytest.approx(whole * weight / weights, abs=0.5 + 1e-9)
    drawn = [mixture[index] for index in range(10 * len(mixture))]
    for source, (length, *_) in enumerate(sources):
        counts = Counter(number for own, number in drawn if own == source)
        assert max(counts.values(), default=0) - min((counts[n] for n in range(length)), default=0) <= 1


def test_an_order_without_blocks_is_one_permutation(folder):
    mixture = Mixture([Part(Numbered(5, None)), Part(Numbered(4, None))], seed=3)
    order = np.random.default_rng([3, 1]).permutation(9)
    assert [mixture[9 + index] for index in range(9)] == [(int(n >= 5), int(n - 5 * (n >= 5))) for n in order]


@pytest.mark.parametrize("path", ["finevision.parquet", "shard-*.tar"])
def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, path):
    plan = recipe(folder, Source(path), Source("data.json", "images"), steps=7)
    plan = Recipe(**{**vars(plan), "save_every": 2})
    engine.train(plan, tmp_path / "whole")
    with killed_after(3):
        engine.train(plan, tmp_path / "parts")
    monkeypatch.setattr(FileDataset, "__getitem__", noting(places := []))
    engine.train(plan, tmp_path / "parts", resume=True)
    assert places == list(range(2, 7))  # nothing is read that was trained on before
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 7


def noting(places: list[int]) -> Any:
    original = FileDataset.__getitem__

    def item(self: FileDataset, index: int) -> dict[str, Any]:
        places.append(index)
        return original(self, index)

    return item


def test_two_workers_give_what_none_gives(folder):
    sources = [Source("finevision.parquet"), Source("data.tar"), Source("saved", weight=None)]
    dataset = make_dataset(recipe(folder, *sources, steps=12), 0, fresh()[1])
    alone, two = (
        list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)) for workers in (0, 2)
    )
    assert len(alone) == 12
    assert all(map(same, alone, two))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_plan_counts_the_samples_of_every_format_and_names_patterns_without_files(folder):
    sources = [Source(path) for path in FILES[1:]]
    found = plan(recipe(folder, *sources))
    assert found["missing"] == []
    assert found["stages"][0]["steps"] == len(sources) * len(TALKS)
    assert plan(recipe(folder, Source("none-*.tar")))["missing"] == [str(folder / "none-*.tar")]


def open_one(path: Path) -> Records:
    return open_records(path.name, [str(path)])


def hostile(path: Path, name: str, **fields: Any) -> Path:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(member, field, value)
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../../etc/1.json", {}),
        ("/etc/1.json", {}),
        ("1.json", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("1.json", {"type": tarfile.LNKTYPE, "linkname": "../2.json"}),
        ("1.json", {"type": tarfile.CHRTYPE}),
    ],
)
def test_a_tar_that_leads_outside_is_refused(tmp_path, name, fields):
    with pytest.raises(InputError, match=r"a\.tar: the member .* pack it anew") as refusal:
        open_one(hostile(tmp_path / "a.tar", name, **fields))
    assert name in str(refusal.value)


def test_a_damaged_file_of_any_format_is_one_line(folder, tmp_path):
    for source, cut in (("data.tar", 3000), ("finevision.parquet", 500), ("data.json", 100)):
        path = tmp_path / source
        path.write_bytes((folder / source).read_bytes()[:cut])
        with pytest.raises(InputError, match=source) as refusal:
            open_one(path)
        assert "\n" not in str(refusal.value)
    (tmp_path / "data.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(InputError, match=r"data\.tar is not a whole, uncompressed tar file"):
        open_one(tmp_path / "data.tar")
    (tmp_path / "data.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"data\.tar"):
        open_one(tmp_path / "data.tar")


def test_a_row_group_that_is_damaged_costs_its_samples_and_no_more(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(finevision(), path, row_group_size=1, compression="snappy")
    content = bytearray(path.read_bytes())
    column = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    items = items_of(recipe(tmp_path, Source("a.parquet"), steps=5))
    told = {reason for item in items for _, reason in item.get(SKIPPED, ())}  # type: ignore[misc]
    assert len(told) == 1
    assert "sample 1: " in next(iter(told))


def test_columns_that_make_no_conversation_are_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"picture": [1], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has the columns picture, caption; give it conversations"):
        open_one(tmp_path / "a.parquet")
    Dataset.from_dict({"caption": ["x"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="saved has the columns caption"):
        open_one(tmp_path / "saved")


@pytest.mark.parametrize(
    "row",
    [
        {"texts": [{"user": 5, "assistant": 6}], "images": None},
        {"texts": [{"q": "what?", "a": "red"}]},
        {"texts": None},
        {"conversations": "what?"},
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}], "image": 5},
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}], "image": b"no image"},
    ],
    ids=str,
)
def test_a_row_of_the_wrong_types_is_a_bad_sample(tmp_path, row):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"the last: a\.parquet: sample 0: "):
        items_of(recipe(tmp_path, Source("a.parquet"), steps=1), 1)


def test_a_giant_image_in_a_file_is_refused_before_it_is_decoded(tmp_path):
    file = io.BytesIO()
    Image.new("1", (20000, 10000)).save(file, "PNG")
    write_tar(tmp_path / "a.tar", {"1.png": file.getvalue(), "1.txt": b"white"})
    with pytest.raises(InputError, match=r"sample 1: 1\.png: the image has 200\.0 megapixels"):
        items_of(recipe(tmp_path, Source("a.tar"), steps=1), 1)


JSON = st.recursive(
    st.sampled_from([None, True, 3, 1.5, "human", "gpt", "user", "<image>", " ", "a.png", "s3://a", "", b"x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, JSON, max_size=5), st.booleans())
def test_any_row_is_a_conversation_or_a_sample_that_is_named(row, is_table):
    with contextlib.suppress(SampleError):
        found = conversation_of(record_of(row, 3) if is_table else row, 3, "images")
        assert found.messages[-1]["role"] == "assistant"


@given(st.lists(st.tuples(st.integers(0, 10239), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_tar_of_damaged_bytes_reads_or_is_refused(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    write_tar(path, {"1.png": b"no image", "1.json": b"{}", "2.txt": b"hello"})
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        found = open_one(path)
        assert all(isinstance(found[number], dict) for number in range(len(found)))


def test_nothing_that_data_name_is_fetched(tmp_path):
    record = {"image": "memory://far/images/a.png", "conversations": conversations([("<image>?", "red")])}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(
        InputError, match=r"memory://far/images/a\.png is an address, and nothing that data name is fetched"
    ):
        items_of(recipe(tmp_path, Source("a.json"), steps=1), 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("gone.tar"), r"there is no data file .*gone\.tar"),
        (Source("gone-*.tar"), r"no file is named like .*gone-\*\.tar"),
        (Source("a.csv"), r"a\.csv is of no known format: \.json, \.jsonl, \.parquet, \.tar"),
        (Source("memory://nowhere/a.tar"), "there is no data file memory://nowhere/a.tar"),
        (Source("nonsense://a.tar"), "nonsense://a.tar cannot be read"),
        (Source("splits"), "splits holds several splits; name the folder of one: train, test"),
    ],
    ids=lambda value: value.name if isinstance(value, Source) else "",
)
def test_a_source_that_cannot_be_is_named(tmp_path, source, message):
    splits = DatasetDict({name: Dataset(onevision().slice(0, 1)) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=message) as refusal:
        make_dataset(recipe(tmp_path, source, steps=1), 0, fresh()[1])
    assert "\n" not in str(refusal.value)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "convllava.data.formats.parquet", None)
    with pytest.raises(InputError, match=r"pip install 'convllava\[data\]'"):
        open_one(folder / "finevision.parquet")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{sources: [{path: a.json, weight: 0}]}", "weight must be above 0, and stands in place of repeat"),
        ("{sources: [{path: a.json, weight: 1, repeat: 2}]}", "stands in place of repeat"),
        ("{sources: [{path: a.json, weight: 1}, {path: b.json}]}", "source a.json: weight is for all sources"),
        ("{sources: [{path: []}]}", "a source needs a path"),
        ("{sources: [{path: [1]}]}", r"path\[0\] must be a str"),
        ("{sources: [{path: a.json, format: csv}]}", "format must be one of json, parquet, webdataset, datasets"),
    ],
)
def test_a_source_of_a_recipe_is_checked_as_it_is_read(tmp_path, data, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: x\nstages:\n  - {{name: a, steps: 3, trains: {{projector: 1e-3}}, data: {data}}}\n")
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_paths_of_a_recipe_may_be_a_list(tmp_path):
    path = tmp_path / "recipe.yaml"
    data = "{sources: [{path: [a.tar, b-*.tar], weight: 2}]}"
    path.write_text(f"name: x\nstages:\n  - {{name: a, steps: 3, trains: {{projector: 1e-3}}, data: {data}}}\n")
    assert load_recipe(path).stages[0].data.sources[0].paths == ["a.tar", "b-*.tar"]


def test_addresses_and_paths_join(tmp_path):
    assert storage.within("s3://bucket/data/", "a.tar") == "s3://bucket/data/a.tar"
    assert storage.within("data", "s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert storage.within("data", "/x/a.tar") == "/x/a.tar"
    assert storage.within("s3://bucket", "") == "s3://bucket"


def test_a_dataset_of_no_usable_sample_says_so(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": []}]))
    dataset = FileDataset(Mixture([Part(open_one(tmp_path / "a.json"))]), fresh()[1], 1)
    with pytest.raises(InputError, match="100 samples in a row cannot be used"):
        dataset[0]
