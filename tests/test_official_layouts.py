"""Published checkpoints: every layout converts in both directions, and damage is reported."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official_files import add_to_shards, change, same, settings_in, tensors_of, tower_in
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from convllava import InputError
from convllava.checkpoints import convert, read
from convllava.checkpoints.tensors import in_shards
from convllava.io import write_json


def test_all_layouts_give_the_same_model(published, tmp_path):
    expected = tensors_of(published)
    weights = load_file(published / "model.safetensors")
    tower = tower_in(published)

    by_reference = tmp_path / "by_reference"
    shutil.copytree(published, by_reference)
    (by_reference / "vision_tower").rename(tmp_path / "tower")
    change(by_reference / "config.json", mm_vision_tower=str(tmp_path / "tower"))

    as_bin = tmp_path / "as_bin"
    shutil.copytree(published, as_bin)
    (as_bin / "model.safetensors").unlink()
    torch.save(weights, as_bin / "pytorch_model.bin")
    (as_bin / "vision_tower" / "pytorch_model.bin").unlink()
    save_file(tower, as_bin / "vision_tower" / "model.safetensors")

    inside = tmp_path / "inside"
    shutil.copytree(published, inside)
    (inside / "vision_tower" / "pytorch_model.bin").unlink()
    add_to_shards(inside, tower)
    in_two_shards(inside)

    for folder in (by_reference, as_bin, inside):
        convert(folder, tmp_path / f"{folder.name}_converted", "float32")
        for found in (folder, tmp_path / f"{folder.name}_converted"):
            assert same(tensors_of(found), expected), found.name


def test_tied_embeddings_are_stored_once(published, tmp_path):
    tied = tmp_path / "tied"
    shutil.copytree(published, tied)
    change(tied / "config.json", tie_word_embeddings=True)
    weights = load_file(tied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors")
    convert(tied, tmp_path / "ours", "float32")
    convert(tmp_path / "ours", tmp_path / "theirs", "float32", to="official")
    for folder in (tied, tmp_path / "ours", tmp_path / "theirs"):
        model, _ = read(folder)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"]), folder.name


def test_base_of_a_whole_checkpoint_is_rejected(published, tmp_path):
    convert(published, tmp_path / "ours", "float32")
    for folder in (published, tmp_path / "ours"):
        with pytest.raises(InputError, match="is a whole checkpoint and not a LoRA; leave `base` out"):
            convert(folder, tmp_path / "new", base=tmp_path)


def in_two_shards(folder: Path) -> None:
    """Replace the single file of a checkpoint by two shards with an index."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        shard = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / shard)
        index |= dict.fromkeys(chosen, shard)
    whole.unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})


def test_lora_is_merged_and_keeps_its_projector(published, tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    weights = load_file(published / "model.safetensors")
    shutil.copytree(published, lora)
    (lora / "model.safetensors").unlink()
    base.mkdir()
    shutil.copy(published / "config.json", base)
    save_file(
        {name: tensor for name, tensor in weights.items() if "mm_projector" not in name}, base / "model.safetensors"
    )
    target, generator = "model.layers.1.self_attn.q_proj.weight", torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    stem = "base_model.model." + target.removesuffix(".weight")
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, lora / "adapter_model.safetensors")
    trained = {f"base_model.model.{name}": 2 * tensor for name, tensor in weights.items() if "mm_projector" in name}
    torch.save(trained, lora / "non_lora_trainables.bin")
    adapter = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "/no/where"}
    write_json(lora / "adapter_config.json", adapter)

    with pytest.raises(InputError, match="a LoRA on '/no/where', which is not here; give its folder as `base`"):
        convert(lora, tmp_path / "model", "float32")
    convert(lora, tmp_path / "model", "float32", base=base)
    merged, plain = tensors_of(tmp_path / "model"), tensors_of(published)
    (lora / "non_lora_trainables.bin").unlink()
    save_file(weights, base / "model.safetensors")
    assert "the projector is that of its base" in convert(lora, tmp_path / "plain_projector", "float32", base=base)
    ours = "model.language_model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[ours], plain[ours] + 2.0 * up @ down)
    for name in plain.keys() - {ours}:
        factor = 2 if "multi_modal_projector" in name else 1
        assert merged[name].equal(factor * plain[name]), name


def test_round_trip_keeps_tensors_settings_and_tokenizer(published, tmp_path):
    convert(published, tmp_path / "ours", "float32")
    convert(tmp_path / "ours", tmp_path / "theirs", "float32", to="official")
    original = load_file(published / "model.safetensors")
    written = {name: tensor.float() for name, tensor in original.items()}
    assert same(load_file(tmp_path / "theirs" / "model.safetensors"), written)
    tower = tower_in(tmp_path / "theirs")
    for name, tensor in tower_in(published).items():
        assert name.startswith("layernorm.") or tower[name].equal(tensor.float()), name
    settings = settings_in(tmp_path / "theirs" / "config.json")
    for key, value in settings_in(published / "config.json").items():
        if key.startswith(("mm_vision", "mm_hidden", "mm_projector_type", "num_", "hidden", "rope", "image_aspect")):
            assert settings[key] == value, key
    assert (tmp_path / "theirs" / "tokenizer.model").read_bytes() == (published / "tokenizer.model").read_bytes()
    plain = AutoTokenizer.from_pretrained(tmp_path / "theirs", config=LlamaConfig())
    assert len(plain) == settings["vocab_size"]
    assert same(tensors_of(tmp_path / "theirs"), tensors_of(published))


def test_round_trip_keeps_rope_scaling(published, tmp_path):
    change(published / "config.json", rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=20000.0)
    convert(published, tmp_path / "ours", "float32")
    rope = read(tmp_path / "ours")[0].config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 20000.0)
    convert(tmp_path / "ours", tmp_path / "theirs", "float32", to="official")
    settings = settings_in(tmp_path / "theirs" / "config.json")
    assert settings["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert settings["rope_theta"] == 20000.0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_shards_hold_every_tensor_once_within_the_limit(sizes, limit):
    tensors = {f"t{number}": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    shards = list(in_shards(tensors.items(), limit))
    assert [name for shard in shards for name in shard] == list(tensors)
    for shard in shards:
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit


def test_sharded_checkpoint_reads_back_equal(published, tmp_path, monkeypatch):
    monkeypatch.setattr(in_shards, "__defaults__", (100_000,))
    convert(published, tmp_path / "ours", "float32")
    convert(tmp_path / "ours", tmp_path / "theirs", "float32", to="official")
    monkeypatch.undo()
    for folder in ("ours", "theirs"):
        index = settings_in(tmp_path / folder / "model.safetensors.index.json")
        assert len(set(index["weight_map"].values())) > 3
        assert same(tensors_of(tmp_path / folder), tensors_of(published))


class Code:
    def __reduce__(self):
        return (print, ("ran",))


def damage_tower(folder: Path) -> None:
    shutil.rmtree(folder / "vision_tower")


def damage_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def damage_pickle(folder: Path) -> None:
    (folder / "vision_tower" / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Code()}))


def damage_vocabulary(folder: Path) -> None:
    change(folder / "config.json", vocab_size=999)


def damage_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.mm_projector.0.weight"] = torch.zeros(64, 128)
    save_file(weights, path)


def damage_empty(folder: Path) -> None:
    (folder / "vision_tower" / "pytorch_model.bin").write_bytes(b"")


def damage_projector(folder: Path) -> None:
    change(folder / "config.json", mm_projector_type="linear")


def damage_pixels(folder: Path) -> None:
    (folder / "vision_tower" / "preprocessor_config.json").write_text("{}")


def damage_completeness(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.mm_projector.2.bias"]
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_tower, "has no vision tower"),
        (damage_shard, r"model\.safetensors is not a readable file of tensors"),
        (damage_pickle, r"pytorch_model\.bin is damaged, or holds code"),
        (damage_vocabulary, "has 1000 tokens, but config.json says vocab_size 999"),
        (damage_shape, r"^[^:]*model\.safetensors: model\.mm_projector\.0\.weight has the shape \[64, 128\]"),
        (damage_empty, r"pytorch_model\.bin is not a readable file of tensors"),
        (damage_pixels, r"preprocessor_config\.json lacks 'size'"),
        (damage_projector, "sets mm_projector_type to .linear.; only mlp2x_gelu is supported"),
        (damage_completeness, r"lacks the tensor model\.multi_modal_projector\.linear_2\.bias"),
    ],
)
def test_damage_gives_one_line_and_writes_nothing(published, tmp_path, capsys, damage, message):
    damage(published)
    with pytest.raises(InputError, match=message) as caught:
        convert(published, tmp_path / "model", "float32")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official"]
    assert "ran" not in capsys.readouterr().out
