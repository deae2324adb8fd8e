"""Tar files: the members of a sample, headers that are read once, and members that lead outside."""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_files import items_of, members, open_one, png, recipe, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from convllava.data.formats import tar
from convllava.errors import InputError
from convllava.training.recipe import Source


def test_a_caption_answers_a_request(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": png("a.png"), "1.txt": b"a red top\n", "1.cls": b"7"})
    record = open_one(tmp_path / "a.tar")[0]
    assert record["id"] == "1"
    assert [turn["value"] for turn in record["conversations"]] == ["Describe the image.", "a red top"]
    assert record["image"][0].content == png("a.png")


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    apart = sorted(members().items(), key=lambda member: member[0].endswith("json"))
    write_tar(tmp_path / "apart.tar", dict(apart))
    write_tar(tmp_path / "a.tar", members())
    found, expected = open_one(tmp_path / "apart.tar"), open_one(tmp_path / "a.tar")
    by_id = {found[number]["id"]: found[number] for number in range(len(found))}
    assert by_id == {expected[number]["id"]: expected[number] for number in range(len(expected))}


def test_the_headers_of_a_large_tar_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv(tar.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(tar, "_CACHED_FROM", 3)
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
    monkeypatch.setenv(tar.CACHE, str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", {"1.txt": b"another"})
    assert len(open_one(tmp_path / "a.tar")) == 1


def test_an_unusable_cache_does_not_stop_reading(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv(tar.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(tar, "_CACHED_FROM", 1)
    write_tar(tmp_path / "a.tar", members())
    assert len(open_one(tmp_path / "a.tar")) == len(open_one(tmp_path / "a.tar")) == 5


def test_a_user_without_a_home_folder_can_read_tar_files(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(tar.CACHE, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tar, "_CACHED_FROM", 1)
    write_tar(tmp_path / "a.tar", members())
    assert len(open_one(tmp_path / "a.tar")) == 5


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
def test_members_that_lead_outside_are_rejected(tmp_path, name, fields):
    with pytest.raises(InputError, match=r"a\.tar: the member .* pack it again") as refusal:
        open_one(hostile(tmp_path / "a.tar", name, **fields))
    assert name in str(refusal.value)


@given(st.lists(st.tuples(st.integers(0, 10239), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_tar_files_are_read_or_rejected(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    write_tar(path, {"1.png": b"no image", "1.json": b"{}", "2.txt": b"hello"})
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        found = open_one(path)
        assert all(isinstance(found[number], dict) for number in range(len(found)))


def test_a_giant_image_is_rejected_before_it_is_decoded(tmp_path):
    file = io.BytesIO()
    Image.new("1", (20000, 10000)).save(file, "PNG")
    write_tar(tmp_path / "a.tar", {"1.png": file.getvalue(), "1.txt": b"white"})
    with pytest.raises(InputError, match=r"sample 1: 1\.png: the image has 200\.0 megapixels"):
        items_of(recipe(tmp_path, Source("a.tar"), steps=1), 1)
