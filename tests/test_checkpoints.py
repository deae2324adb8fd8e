"""Folders that are whole or absent, and conversion between precisions."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from conftest import fresh, picture

from convllava import InputError
from convllava.checkpoints import convert, read, whole_folder, write
from convllava.inference import Assistant
from convllava.model.builder import build_fresh


def test_converted_weights_are_half_the_size_and_rounded_alike(tmp_path):
    write(*fresh(), tmp_path / "full")
    convert(tmp_path / "full", tmp_path / "half", "bfloat16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    full, half = (dict(read(tmp_path / name)[0].named_parameters()) for name in ("full", "half"))
    for name, parameter in full.items():
        assert half[name].equal(parameter.bfloat16().float()), name
    assert isinstance(Assistant(*read(tmp_path / "half")).ask(picture(64, 64), "what?", max_new_tokens=2), str)


def test_conversion_refuses_what_it_cannot_do(tmp_path):
    write(*fresh(), tmp_path / "full")
    with pytest.raises(InputError, match="`dtype` 'int3' is not known"):
        convert(tmp_path / "full", tmp_path / "a", "int3")
    with pytest.raises(InputError, match="exists already"):
        convert(tmp_path / "full", tmp_path / "full")
    with pytest.raises(InputError, match="there is no model"):
        convert(tmp_path / "nowhere", tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "model"

    def fail() -> None:
        with whole_folder(target) as folder:
            (folder / "half").write_text("a")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / "file").write_text(text)
        assert (target / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_of_tensors_are_as_readable_as_the_others(tmp_path):
    model, processor = fresh()
    before = os.umask(0o027)
    try:
        write(model, processor, tmp_path / "model", extra_tensors={"training/heads.safetensors": {"a": torch.zeros(1)}})
        convert(tmp_path / "model", tmp_path / "converted")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert sum(path.suffix == ".safetensors" for path in modes) == 3
    assert set(modes.values()) == {0o640}


def test_what_a_kill_left_of_an_older_folder_stops_no_write(tmp_path):
    for name in ("model", ".model.older"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    with whole_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "new"


def test_a_fresh_model_is_the_same_for_the_same_seed():
    for first, second in zip(fresh(seed=3)[0].parameters(), fresh(seed=3)[0].parameters(), strict=True):
        assert torch.equal(first, second)


def language_model(**settings: int) -> torch.nn.Module:
    language = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"depths": [1] * 5, "hidden_sizes": [8] * 5}
    model, _ = build_fresh(vision=vision, language={**language, **settings}, pixels={}, words=())
    return model.model.language_model


def test_attention_begins_by_matching_and_copying():
    attention = language_model().layers[0].self_attn
    assert attention.k_proj.weight.equal(attention.q_proj.weight)
    assert attention.o_proj.weight.equal(attention.v_proj.weight.T)


def test_keys_shared_by_several_queries_are_left_as_they_are():
    attention = language_model(num_key_value_heads=1).layers[0].self_attn
    assert attention.k_proj.weight.shape != attention.q_proj.weight.shape
