"""Published checkpoints: of several vision towers the right one is taken, and all of it."""

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
    """The checkpoint with the original four-stage tower and a projector of its width."""
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


def test_a_four_stage_tower_gives_the_originals_features(four_stages):
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


def test_a_tower_that_its_config_counts_too_long_is_taken_as_it_is(published):
    depths = settings_in(published / "vision_tower" / "config.json")["depths"]
    change(published / "vision_tower" / "config.json", depths=[*depths[:3], depths[3] + 1, depths[4]])
    change(published / "config.json", mm_vision_select_layer=-2)
    assert list(read(published)[0].config.vision_config.depths) == depths


def test_of_two_towers_the_checkpoints_own_counts_and_that_is_said(published, tmp_path):
    expected, older = tensors_of(published), tmp_path / "older"
    shutil.copytree(published / "vision_tower", older)
    torch.save({name: tensor + 1 for name, tensor in tower_in(published).items()}, older / "pytorch_model.bin")
    change(published / "config.json", mm_vision_tower=str(older))
    note = convert(published, tmp_path / "model", "float32")
    assert str(published / "vision_tower") in note
    assert str(older) in note
    assert same(tensors_of(tmp_path / "model"), expected)


def test_the_checkpoints_own_tower_counts_before_one_in_the_shards(published, tmp_path):
    expected = tensors_of(published)
    add_to_shards(published, {name: tensor + 1 for name, tensor in tower_in(published).items()})
    assert "there is another among" in convert(published, tmp_path / "model", "float32")
    assert same(tensors_of(tmp_path / "model"), expected)


def test_a_checkpoint_that_lost_its_towers_file_does_not_take_another(published, tmp_path):
    shutil.copytree(published / "vision_tower", tmp_path / "earlier")
    change(published / "config.json", mm_vision_tower=str(tmp_path / "earlier"))
    assert convert(published, tmp_path / "whole", "float32") == ""  # the same tower twice is nothing to tell
    (published / "vision_tower" / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"vision_tower has a config\.json but neither model\.safetensors nor"):
        read(published)


def test_a_runs_checkpoint_beside_the_tower_that_it_began_with(published, tmp_path):
    """Stage 5 is in the shards, and in no config.json: `mm_vision_tower` names the four stages given to stage 1."""
    expected = tensors_of(published)
    add_to_shards(published, tower_in(published))
    shutil.rmtree(published / "vision_tower")
    shutil.copytree(FOUR_STAGES, tmp_path / "four")
    shutil.copy(CHECKPOINT / "vision_tower" / "preprocessor_config.json", tmp_path / "four")
    change(published / "config.json", mm_vision_tower=str(tmp_path / "four"))
    assert same(tensors_of(published), expected)
