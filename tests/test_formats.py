"""Every format, local or remote, gives training the same samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import fresh
from data_files import (
    FILES,
    TALKS,
    conversations,
    finevision,
    in_file_order,
    items_of,
    members,
    onevision,
    open_one,
    recipe,
    same,
    write_all,
    write_parquet,
    write_tar,
)
from datasets import Dataset, DatasetDict

from convllava.data import storage
from convllava.data.formats import open_records
from convllava.errors import InputError
from convllava.training.datasets import make_dataset
from convllava.training.plan import plan
from convllava.training.recipe import Source
from convllava.training.stage import StageRun


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def far(folder) -> str:
    """Copy the files to memory://."""
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/far/{path.relative_to(folder)}", path.read_bytes())
    return "memory://far"


def test_the_format_does_not_depend_on_upper_or_lower_case(tmp_path):
    for name in ("d.jsonl", "D.JSONL"):
        (tmp_path / name).write_text('{"id": 1}\n{"id": 2}\n')
        assert [record["id"] for record in open_records(name, [str(tmp_path / name)])] == [1, 2]


@pytest.mark.parametrize("path", FILES, ids=str)
@pytest.mark.parametrize("place", ["folder", "far"])
def test_every_format_gives_the_same_items(request, place, path, folder):
    root = request.getfixturevalue(place)
    expected = in_file_order(recipe(folder, Source("data.json", "images"), steps=1))
    found = in_file_order(recipe(root, Source(path, "images"), steps=1))
    assert len(found) == len(TALKS)
    assert all(map(same, found, expected))


def test_a_limit_takes_the_first_records_of_all_shards(folder):
    pieces = [str(folder / f"piece-{number}.parquet") for number in (0, 1)]
    whole, some = open_records("pieces", pieces), open_records("pieces", pieces, limit=4)
    assert (len(whole), len(some)) == (5, 4)
    assert [some[number] for number in range(4)] == [whole[number] for number in range(4)]
    assert whole.row_groups.starts.tolist() == [0, 2, 3]
    assert open_records("pieces", pieces, limit=2).row_groups.starts.tolist() == [0]


def test_two_workers_give_the_same_items_as_none(folder):
    sources = [Source("finevision.parquet"), Source("data.tar"), Source("saved")]
    dataset = make_dataset(StageRun(recipe(folder, *sources, steps=12), 0, fresh()[1]))
    alone, two = (
        list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)) for workers in (0, 2)
    )
    assert len(alone) == 12
    assert all(map(same, alone, two))


def test_a_plan_counts_the_samples_of_every_format_and_names_patterns_without_files(folder):
    sources = [Source(path) for path in FILES[1:]]
    found = plan(recipe(folder, *sources))
    assert found["missing"] == []
    assert found["stages"][0]["steps"] == len(sources) * len(TALKS)
    assert plan(recipe(folder, Source("none-*.tar")))["missing"] == [str(folder / "none-*.tar")]


def test_addresses_and_paths_join():
    assert storage.within("s3://bucket/data/", "a.tar") == "s3://bucket/data/a.tar"
    assert storage.within("data", "s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert storage.within("data", "/x/a.tar") == "/x/a.tar"
    assert storage.within("s3://bucket", "") == "s3://bucket"


def test_a_file_that_disappears_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", members())
    write_parquet(tmp_path / "a.parquet", finevision())
    for path in (tmp_path / "a.tar", tmp_path / "a.parquet"):
        found = open_one(path)
        path.unlink()
        with pytest.raises(InputError, match=f"there is no data file .*{path.name}"):
            found[0]


def test_damaged_files_give_one_line_errors(folder, tmp_path):
    for source, cut in (("data.tar", 3000), ("finevision.parquet", 500), ("data.json", 100)):
        path = tmp_path / source
        path.write_bytes((folder / source).read_bytes()[:cut])
        with pytest.raises(InputError, match=source) as refusal:
            open_one(path)
        assert "\n" not in str(refusal.value)
    for content in (b"\x1f\x8b" + bytes(600), b""):
        (tmp_path / "data.tar").write_bytes(content)
        with pytest.raises(InputError, match=r"data\.tar is not a complete, uncompressed tar file"):
            open_one(tmp_path / "data.tar")


def test_addresses_inside_the_data_are_not_fetched(tmp_path):
    record = {"image": "memory://far/images/a.png", "conversations": conversations([("<image>?", "red")])}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(
        InputError, match=r"memory://far/images/a\.png is an address; addresses inside the data are not fetched"
    ):
        items_of(recipe(tmp_path, Source("a.json"), steps=1), 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("gone.tar"), r"there is no data file .*gone\.tar"),
        (Source("gone-*.tar"), r"no file matches .*gone-\*\.tar"),
        (Source("a.csv"), r"a\.csv is of no known format: \.json, \.jsonl, \.parquet, \.tar"),
        (Source("memory://nowhere/a.tar"), "there is no data file memory://nowhere/a.tar"),
        (Source("nonsense://a.tar"), "nonsense://a.tar cannot be read"),
        (Source("splits"), "splits holds several splits; name the folder of one: train, test"),
    ],
    ids=lambda value: value.name if isinstance(value, Source) else "",
)
def test_unusable_sources_are_named(tmp_path, source, message):
    splits = DatasetDict({name: Dataset(onevision().slice(0, 1)) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=message) as refusal:
        make_dataset(StageRun(recipe(tmp_path, source, steps=1), 0, fresh()[1]))
    assert "\n" not in str(refusal.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "convllava.data.formats.parquet", None)
    with pytest.raises(InputError, match=r"pip install 'convllava\[data\]'"):
        open_one(tmp_path / "a.parquet")
