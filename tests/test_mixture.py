"""The order of the records of several sources: all of them, mixed, and the same for a resumed run."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_files import items_of, open_one, recipe, same, write_all
from hypothesis import given
from hypothesis import strategies as st
from killing import killed_after
from training_runs import logged

from convllava.data.dataset import FileDataset
from convllava.data.formats import Records, RowGroups, parquet
from convllava.data.mixture import Mixture, MixtureSource
from convllava.errors import InputError
from convllava.training import train as engine
from convllava.training.recipe import Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


class Numbered(Records):
    """A number of records, in row groups of a size or without row groups."""

    name = "numbered"

    def __init__(self, length: int, group: int | None) -> None:
        self.length, self.group = length, group

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index}

    @property
    def row_groups(self) -> RowGroups | None:
        if self.group is None:
            return None
        starts = np.arange(0, self.length, self.group, dtype=np.int64)
        return RowGroups(starts, np.full(len(starts), 60 * 2**20, dtype=np.int64))


SOURCES = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0.2, 3), st.none() | st.integers(1, 4)), min_size=1, max_size=4
)


@given(SOURCES, st.integers(0, 2))
def test_a_mixture_repeats_each_source_as_often_as_requested(sources, epoch):
    parts = [MixtureSource(Numbered(length, group), repeat=repeat) for length, repeat, group in sources]
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
def test_weights_share_an_epoch_and_use_every_record_in_turn(sources):
    parts = [MixtureSource(Numbered(length, group), weight=weight) for length, weight, group in sources]
    whole, weights = sum(length for length, *_ in sources), sum(weight for _, weight, _ in sources)
    mixture = Mixture(parts)
    taken = Counter(mixture[index][0] for index in range(len(mixture)))
    for source, (_, weight, _) in enumerate(sources):
        assert taken[source] == pytest.approx(whole * weight / weights, abs=0.5 + 1e-9)
    drawn = [mixture[index] for index in range(10 * len(mixture))]
    for source, (length, *_) in enumerate(sources):
        counts = Counter(number for own, number in drawn if own == source)
        assert max(counts.values(), default=0) - min((counts[n] for n in range(length)), default=0) <= 1


def test_the_order_without_row_groups_is_one_permutation():
    mixture = Mixture([MixtureSource(Numbered(5, None)), MixtureSource(Numbered(4, None))], seed=3)
    order = np.random.default_rng([3, 1]).permutation(9)
    assert [mixture[9 + index] for index in range(9)] == [(int(n >= 5), int(n - 5 * (n >= 5))) for n in order]


def test_each_row_group_is_read_once_in_an_epoch(tmp_path, monkeypatch):
    """The cache and the windows of the order both hold two row groups."""
    table = pyarrow.Table.from_pylist([{"texts": [{"user": f"q{n}", "assistant": "x" * 5000}]} for n in range(60)])
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", row_group_size=6, compression="none", use_dictionary=False
    )
    found = open_one(tmp_path / "a.parquet")
    bound = 2 * int(found.row_groups.sizes.max())
    monkeypatch.setattr("convllava.data.mixture.WINDOW_BYTES", bound)
    monkeypatch.setattr(parquet, "_CACHE", parquet.RowGroupCache(bound))
    read: list[int] = []
    original = parquet.ParquetRecords._read
    monkeypatch.setattr(
        parquet.ParquetRecords, "_read", lambda self, group: (read.append(group), original(self, group))[1]
    )
    mixture = Mixture([MixtureSource(found)])
    order = [mixture[place][1] for place in range(60)]
    assert {found[number]["conversations"][0]["value"] for number in order} == {f"q{n}" for n in range(60)}
    assert sorted(read) == list(range(10))
    assert read != sorted(read)
    assert any(abs(a - b) > 6 for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("path", ["data.jsonl", "data.tar", "saved"])
def test_formats_with_random_access_have_the_same_order(folder, path):
    expected = items_of(recipe(folder, Source("data.json", "images"), steps=9), 9)
    assert all(map(same, items_of(recipe(folder, Source(path, "images"), steps=9), 9), expected))


@pytest.mark.parametrize("path", ["finevision.parquet", "shard-*.tar"])
def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, path):
    plan = recipe(folder, Source(path), Source("data.json", "images"), steps=7)
    plan = dataclasses.replace(plan, save_every=2)
    engine.train(plan, tmp_path / "whole")
    with killed_after(3):
        engine.train(plan, tmp_path / "parts")
    monkeypatch.setattr(FileDataset, "__getitem__", noting(places := []))
    engine.train(plan, tmp_path / "parts", resume=True)
    assert places == list(range(2, 7))  # earlier samples are not read again
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert len(logged(tmp_path / "whole")) == 7


def noting(places: list[int]) -> Any:
    original = FileDataset.__getitem__

    def item(self: FileDataset, index: int) -> dict[str, Any]:
        places.append(index)
        return original(self, index)

    return item
