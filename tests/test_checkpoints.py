"""Checkpoint folders are written completely or not at all; conversion between precisions; initial weights."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from conftest import fresh, picture

from convllava import InputError
from convllava.checkpoints import convert, read, whole_folder, write
from convllava.inference import Assistant
from convllava.model.builder import build_fresh, initialise_attention


def test_bfloat16_conversion_rounds_and_halves_the_file(tmp_path):
    write(*fresh(), tmp_path / "full")
    convert(tmp_path / "full", tmp_path / "half", "bfloat16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    full, half = (dict(read(tmp_path / name)[0].named_parameters()) for name in ("full", "half"))
    for name, parameter in full.items():
        assert half[name].equal(parameter.bfloat16().float()), name
    assert isinstance(Assistant(*read(tmp_path / "half")).ask(picture(64, 64), "what?", max_new_tokens=2), str)


def test_invalid_conversions_are_rejected(tmp_path):
    write(*fresh(), tmp_path / "full")
    with pytest.raises(InputError, match="`dtype` 'int3' is not known"):
        convert(tmp_path / "full", tmp_path / "a", "int3")
    with pytest.raises(InputError, match="exists already"):
        convert(tmp_path / "full", tmp_path / "full")
    with pytest.raises(InputError, match="there is no model"):
        convert(tmp_path / "nowhere", tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_failed_write_leaves_no_folder(tmp_path):
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


def test_tensor_files_have_the_permissions_of_other_files(tmp_path):
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


def test_folder_left_by_a_kill_does_not_block_writing(tmp_path):
    for name in ("model", ".model.older"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    with whole_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "new"


def test_fresh_models_of_one_seed_are_equal():
    for first, second in zip(fresh(seed=3)[0].parameters(), fresh(seed=3)[0].parameters(), strict=True):
        assert torch.equal(first, second)


def language_model(**settings: int) -> torch.nn.Module:
    language = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"depths": [1] * 5, "hidden_sizes": [8] * 5}
    model, _ = build_fresh(vision=vision, language={**language, **settings}, pixels={}, words=())
    return model.model.language_model


def test_fresh_attention_weights_are_tied_in_pairs():
    attention = language_model().layers[0].self_attn
    assert attention.k_proj.weight.equal(attention.q_proj.weight)
    assert attention.o_proj.weight.equal(attention.v_proj.weight.T)


def test_attention_with_shared_keys_keeps_its_weights():
    model = language_model(num_key_value_heads=1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    initialise_attention(model)
    for name, weight in model.named_parameters():
        assert weight.equal(before[name]), name
