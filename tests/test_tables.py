"""Tables from Parquet files and `datasets`: columns, rows, and damaged rows."""

from __future__ import annotations

import contextlib

import pyarrow
import pyarrow.parquet
import pytest
from conftest import fresh
from data_files import (
    TALKS,
    conversations,
    finevision,
    in_file_order,
    items_of,
    onevision,
    open_one,
    recipe,
    same,
    write_parquet,
)
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from convllava.data.collate import SKIPPED
from convllava.data.formats.base import record_of
from convllava.data.records import SampleError, conversation_of
from convllava.errors import InputError
from convllava.training.datasets import make_dataset
from convllava.training.recipe import Source
from convllava.training.stage import StageRun


def test_dataset_name_is_loaded_by_load_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "local").mkdir()
    write_parquet(tmp_path / "local" / "train.parquet", onevision())
    sources = (Source("local", format="datasets"), Source("local/train.parquet"))
    found, expected = (in_file_order(recipe(tmp_path, source, steps=1)) for source in sources)
    assert len(found) == len(TALKS)
    assert all(map(same, found, expected))
    with pytest.raises(InputError, match="local does not load as a dataset"):
        make_dataset(
            StageRun(recipe(tmp_path, Source("local", format="datasets", split="gone"), steps=1), 0, fresh()[1])
        )


def test_unsupported_columns_are_named(tmp_path):
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
def test_row_of_wrong_types_is_a_bad_sample(tmp_path, row):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"the last: a\.parquet: sample 0: "):
        items_of(recipe(tmp_path, Source("a.parquet"), steps=1), 1)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_invalid_utf_8_is_a_bad_sample(tmp_path, form):
    row = {"id": "1", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]}
    table = pyarrow.Table.from_pylist([row, row | {"id": "2"}])
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.array([0, 1, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"1\xff\xfe")],
    )
    table = table.set_column(0, "id", invalid)
    if form == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        Dataset(table).save_to_disk(tmp_path / "a")
    records = open_one(tmp_path / ("a.parquet" if form == "parquet" else "a"))
    assert records[0]["id"] == "1"
    with pytest.raises(InputError, match=r"row 1 cannot be read: .*utf-8"):
        records[1]


def test_damaged_row_group_loses_only_its_samples(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(finevision(), path, row_group_size=1, compression="snappy")
    content = bytearray(path.read_bytes())
    column = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    items = items_of(recipe(tmp_path, Source("a.parquet"), steps=5))
    reasons = {reason for item in items for _, reason in item.get(SKIPPED, ())}
    assert len(reasons) == 1
    assert "sample 1: " in next(iter(reasons))


KEYS = st.sampled_from(
    ["id", "image", "images", "conversations", "texts", "from", "value", "user", "assistant", "bytes", "path"]
)
JSON = st.recursive(
    st.sampled_from([None, True, 3, 1.5, "human", "gpt", "user", "<image>", " ", "a.png", "s3://a", "", b"x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
TEXTS = st.sampled_from(["what?", "red", "<image>?"])
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=2)
PAIRS = TURNS.map(lambda turns: [{"user": user, "assistant": assistant} for user, assistant in turns])
ROWS = st.fixed_dictionaries(
    {"conversations": TURNS.map(conversations) | JSON, "image": st.none() | st.just("a.png") | JSON},
    optional={"id": JSON, "images": st.none() | JSON, "texts": PAIRS | JSON},
)
"""Some rows are conversations, some are almost conversations, and some are arbitrary."""


@given(ROWS, st.booleans())
def test_any_row_is_a_conversation_or_a_bad_sample(row, is_table):
    with contextlib.suppress(SampleError):
        found = conversation_of(record_of(row, 3) if is_table else row, 3, "images")
        assert found.messages[-1]["role"] == "assistant"
