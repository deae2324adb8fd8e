"""Cached features of frozen stages: training is the same, without running these stages again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh, picture
from killing import killed_after
from safetensors.torch import save_file
from training_runs import ONE, TWO, logged, train

from convllava.errors import InputError
from convllava.model.vision_tower import ConvLlavaStageFeatures, ConvLlavaVisionModel
from convllava.training import train as engine
from convllava.training.distributed import check_sharding
from convllava.training.frozen_features import FeatureStore, count_frozen_stages, feature_name
from convllava.training.recipe import Adapter, Budget, Data, Evaluation, ModelSpec, Recipe, Source, Stage

PROJECTOR = {"stage5": 1e-3, "projector": 1e-3}
INSTRUCT = {"projector": 1e-3, "language_model": 1e-3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records: list[dict[str, Any]] = []
    for number, size in enumerate([(64, 64), (64, 128), (128, 64), (128, 128), (128, 128)]):
        picture(*size, seed=number).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "red " * (1 + number)}]
        records.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
    records.append({"id": "text", "conversations": records[0]["conversations"]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def recipe(folder: Path, gb: float = 1.0, **settings: Any) -> Recipe:
    data = Data(sources=[Source("data.json")])
    stage = Stage("files", 6, INSTRUCT, data, batch_size=4, feature_cache_gb=gb)
    model = ModelSpec(
        vision={"depths": [1] * 5, "hidden_sizes": [8, 8, 16, 16, 32], "layer_scale_init_value": 0.5},
        language={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        pixels={"min_pixels": 64 * 64, "max_pixels": 128 * 128},
    )
    return Recipe("files", [dataclasses.replace(stage, **settings)], model, data_root=str(folder), workers=0)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Return a list that receives the number of frozen stages for each image that is encoded."""
    begin, found = ConvLlavaVisionModel.begin, []

    def recording(self, images, stages):
        found.append(stages)
        return begin(self, images, stages)

    monkeypatch.setattr(ConvLlavaVisionModel, "begin", recording)
    return found


@pytest.mark.parametrize("stages", range(6))
def test_tower_from_stage_features_equals_whole_tower(stages):
    tower = fresh()[0].model.vision_tower
    images = [torch.randn(3, *size) for size in ((64, 128), (128, 64))]
    whole = tower(images)
    parts = tower(tower.begin(images, stages))
    assert parts.grids == whole.grids
    torch.testing.assert_close(parts.last_hidden_state, whole.last_hidden_state, atol=1e-6, rtol=1e-5)
    alone = [tower.begin([image], stages).maps()[0] for image in images]
    again = tower(ConvLlavaStageFeatures.of_maps(alone, stages))
    torch.testing.assert_close(again.last_hidden_state, whole.last_hidden_state, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("trains", "frozen"), [(PROJECTOR, 4), (INSTRUCT, 5)])
def test_cached_run_equals_uncached(folder, encoded, trains, frozen):
    settings = {"learning_rates": trains, "batch_size": 1, "steps": 8}
    for name, gb, images in (("without", 0.0, 7), ("first", 1.0, 5), ("second", 1.0, 0)):
        encoded.clear()
        engine.train(recipe(folder, gb, **settings), folder / name)
        assert logged(folder / name) == logged(folder / "without")
        assert encoded == [frozen] * images


def test_cached_bfloat16_run_equals_uncached(folder):
    settings = {"learning_rates": PROJECTOR, "precision": "bfloat16", "batch_size": 1, "steps": 8}
    for name, gb in (("without", 0.0), ("with", 1.0)):
        engine.train(recipe(folder, gb, **settings), folder / name)
    assert logged(folder / "with") == logged(folder / "without")


def test_cache_works_with_packing_budget_adapter_and_evaluation(folder, encoded):
    held_out = Evaluation(every=3, samples=6, sources=[Source("data.json")], pictures=1)
    adapter = Adapter(rank=2, parts=["language_model"])
    settings = {"packing": True, "budget": Budget(tokens=60), "evaluation": held_out, "adapter": adapter}
    for name, gb in (("without", 0.0), ("with", 1.0)):
        encoded.clear()
        engine.train(recipe(folder, gb, **settings), folder / name)
    assert len(encoded) == 5
    for key in ("loss", "eval_loss"):
        assert logged(folder / "with", key) == pytest.approx(logged(folder / "without", key), abs=1e-6)


def test_other_weights_get_another_cache(folder, encoded):
    engine.train(recipe(folder), folder / "one")
    engine.train(dataclasses.replace(recipe(folder), seed=1), folder / "two")
    assert len(encoded) == 10
    assert len(list((folder / ".cache" / "features").iterdir())) == 2


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}])
def test_other_tower_settings_get_another_cache(folder, encoded, change):
    first = recipe(folder)
    second = dataclasses.replace(first, model=dataclasses.replace(first.model, vision=first.model.vision | change))
    engine.train(first, folder / "one")
    engine.train(second, folder / "two")
    assert len(encoded) == 10


def test_full_cache_computes_the_rest_again(folder, encoded):
    engine.train(recipe(folder, gb=1000 / 1e9), folder / "little")
    kept = list((folder / ".cache" / "features").rglob("*.safetensors"))
    assert 1 <= len(kept) < 5
    assert sum(path.stat().st_size for path in kept) < 1000
    assert len(encoded) > 5
    engine.train(recipe(folder, gb=0.0), folder / "without")
    assert logged(folder / "little") == pytest.approx(logged(folder / "without"), abs=1e-6)


def test_damaged_file_is_ignored_and_full_disk_only_warns(tmp_path, monkeypatch, capsys):
    store, features = FeatureStore(tmp_path, 1e9), torch.randn(2, 3, 4)
    name = feature_name(torch.zeros(3, 64, 64))
    store.write(name, features)
    assert store.read(name).equal(features)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    assert store.read(name) is None
    assert store.read("ab" + name) is None

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("convllava.training.frozen_features.save_file", full)
    store.write("cd" + name, features)
    assert "No space left" in capsys.readouterr().err
    assert store.read("cd" + name) is None
    assert store.room == 0


def test_concurrent_writes_of_the_same_features_both_succeed(tmp_path, monkeypatch):
    one, two = FeatureStore(tmp_path, 1e9), FeatureStore(tmp_path, 1e9)

    def save_during_another_write(tensors, path):
        monkeypatch.setattr("convllava.training.frozen_features.save_file", save_file)
        save_file(tensors, path)
        two.write("abcd", torch.ones(3))

    monkeypatch.setattr("convllava.training.frozen_features.save_file", save_during_another_write)
    one.write("abcd", torch.ones(3))
    assert one.room == two.room > 0
    assert one.read("abcd").equal(torch.ones(3))
    assert len(list((tmp_path / "ab").iterdir())) == 1


def test_feature_names_depend_on_pixels_and_shape():
    image = torch.arange(3 * 64 * 128.0).view(3, 64, 128)
    assert feature_name(image) == feature_name(image.clone()) != feature_name(image.view(3, 128, 64))
    assert feature_name(image) != feature_name(image + 1)


def test_resumed_cached_run_equals_uninterrupted(folder):
    whole = dataclasses.replace(recipe(folder, learning_rates=PROJECTOR), save_every=2)
    engine.train(whole, folder / "whole")
    for path in (folder / ".cache" / "features").rglob("*.safetensors"):
        path.unlink()
    with killed_after(3):
        engine.train(whole, folder / "parts")
    next((folder / ".cache" / "features").rglob("*.safetensors")).unlink()
    engine.train(whole, folder / "parts", resume=True)
    assert logged(folder / "parts") == logged(folder / "whole")


def test_two_processes_cache_the_features_of_one(folder):
    plan = dataclasses.replace(recipe(folder, learning_rates=PROJECTOR), workers=1)
    for name, program in (("two", TWO), ("one", ONE)):
        train(plan, folder / name, program)
    assert logged(folder / "two") == pytest.approx(logged(folder / "one"), abs=1e-4)
    files = [path for path in (folder / ".cache" / "features").rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".safetensors"] * 5


def test_stages_before_the_first_trained_stage_are_frozen(folder):
    stage = recipe(folder).stages[0]
    frozen = [
        count_frozen_stages(dataclasses.replace(stage, learning_rates=trains), 5) for trains in (PROJECTOR, INSTRUCT)
    ]
    assert frozen == [4, 5]
    assert count_frozen_stages(dataclasses.replace(stage, learning_rates={"stem": 1e-3}, feature_cache_gb=0.0), 5) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Data()}, "feature_cache_gb needs data from files"),
        ({"learning_rates": {"stage1": 1e-3, "projector": 1e-3}}, "stage1 trains"),
        ({"feature_cache_gb": -1.0}, "feature_cache_gb must be 0 or more"),
    ],
)
def test_invalid_cache_settings_are_rejected(folder, change, message):
    with pytest.raises(InputError, match=message):
        recipe(folder, **change)


def test_cache_is_rejected_with_a_sharded_tower(folder):
    with pytest.raises(InputError, match="feature_cache_gb needs a whole model in each process"):
        check_sharding(dataclasses.replace(recipe(folder), sharding="fsdp"), 2)
