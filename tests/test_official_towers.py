"""Published checkpoints with several vision towers: the right one is loaded, and completely."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from official_files import (
    CHECKPOINT,
    FOUR_STAGES,
    GOLDEN,
    add_to_shards,
    change,
    same,
    settings_in,
    tensors_of,
    tower_in,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from convllava import InputError
from convllava.checkpoints import convert, read
from convllava.model.modeling import ConvLlavaForConditionalGeneration


@pytest.fixture
def four_stages(published: Path) -> Path:
    """Return the checkpoint with the original four-stage tower and a projector of its width."""
    shutil.rmtree(published / "vision_tower")
    shutil.copytree(FOUR_STAGES, published / "vision_tower")
    change(published / "config.json", mm_vision_select_layer=-1)
    weights = load_file(published / "model.safetensors")
    weights["model.mm_projector.0.weight"] = weights["model.mm_projector.0.weight"][:, :128].contiguous()
    save_file(weights, published / "model.safetensors")
    return published


def features(model: ConvLlavaForConditionalGeneration) -> Tensor:
    with torch.no_grad():
        return model.model.vision_tower(GOLDEN["square/pixel_values"]).last_hidden_state


def test_four_stage_tower_equals_the_original_features(four_stages):
    model, _ = read(four_stages)
    assert list(model.config.vision_config.depths) == settings_in(FOUR_STAGES / "config.json")["depths"]
    expected = GOLDEN["original4_select-1/square/vision_features"][0]
    torch.testing.assert_close(features(model), expected, atol=1e-4, rtol=0)


def test_select_layer_drops_the_last_block_of_four_stages(four_stages, tmp_path):
    last, _ = read(four_stages)
    change(four_stages / "config.json", mm_vision_select_layer=-2)
    convert(four_stages, tmp_path / "model", "float32")
    shorter, _ = read(tmp_path / "model")
    depths = last.config.vision_config.depths
    assert list(shorter.config.vision_config.depths) == [*depths[:-1], depths[-1] - 1]
    stage = last.model.vision_tower.encoder.stages[3]
    stage.layers = stage.layers[:-1]
    assert features(shorter).equal(features(last))


def test_tower_depth_follows_the_tensors_and_not_the_config(published):
    depths = settings_in(published / "vision_tower" / "config.json")["depths"]
    change(published / "vision_tower" / "config.json", depths=[*depths[:3], depths[3] + 1, depths[4]])
    change(published / "config.json", mm_vision_select_layer=-2)
    assert list(read(published)[0].config.vision_config.depths) == depths


def test_own_tower_wins_over_the_named_one_with_a_note(published, tmp_path):
    expected, older = tensors_of(published), tmp_path / "older"
    shutil.copytree(published / "vision_tower", older)
    torch.save({name: tensor + 1 for name, tensor in tower_in(published).items()}, older / "pytorch_model.bin")
    change(published / "config.json", mm_vision_tower=str(older))
    note = convert(published, tmp_path / "model", "float32")
    assert str(published / "vision_tower") in note
    assert str(older) in note
    assert same(tensors_of(tmp_path / "model"), expected)


def test_own_tower_wins_over_one_in_the_shards(published, tmp_path):
    expected = tensors_of(published)
    add_to_shards(published, {name: tensor + 1 for name, tensor in tower_in(published).items()})
    assert "there is another among" in convert(published, tmp_path / "model", "float32")
    assert same(tensors_of(tmp_path / "model"), expected)


def test_missing_tensors_of_the_own_tower_are_an_error(published, tmp_path):
    shutil.copytree(published / "vision_tower", tmp_path / "earlier")
    change(published / "config.json", mm_vision_tower=str(tmp_path / "earlier"))
    assert convert(published, tmp_path / "whole", "float32") == ""  # no note if both towers are equal
    (published / "vision_tower" / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"vision_tower has a config\.json but neither model\.safetensors nor"):
        read(published)


def test_checkpoint_of_a_run_uses_the_tower_in_its_shards(published, tmp_path):
    """Stage 5 is only in the shards: `mm_vision_tower` names the four-stage tower that training started from."""
    expected = tensors_of(published)
    add_to_shards(published, tower_in(published))
    shutil.rmtree(published / "vision_tower")
    shutil.copytree(FOUR_STAGES, tmp_path / "four")
    shutil.copy(CHECKPOINT / "vision_tower" / "preprocessor_config.json", tmp_path / "four")
    change(published / "config.json", mm_vision_tower=str(tmp_path / "four"))
    assert same(tensors_of(published), expected)
