"""Costs of a model: sizes equal the paper's, and counted operations equal those of a real run."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from typer.testing import CliRunner

from convllava import InputError
from convllava.checkpoints.inspection import inspect, inspect_tower, training_memory
from convllava.cli import app
from convllava.inference import load
from convllava.model.presets import presets


def test_published_architecture_has_the_sizes_of_the_paper():
    report = inspect("convllava-1536-7b")
    tower = {part: count for part, count in report["parameters"].items() if part.startswith(("stem", "stage"))}
    assert round(sum(tower.values()) / 1e6) == 669
    assert round(tower["stage5"] / 1e6) == 473
    assert round(report["parameters"]["language_model"] / 1e9, 1) == 6.7
    tokens = {cost["height"]: cost["visual_tokens"] for cost in report["images"]}
    assert {side: tokens[side] for side in (768, 1024, 1536)} == {768: 144, 1024: 256, 1536: 576}


def test_tower_cost_is_linear_in_pixels():
    costs = {cost["height"]: cost["tower_gflop"] for cost in inspect("convllava-768-7b")["images"]}
    assert costs[1536] / costs[768] == pytest.approx(4.0, rel=1e-3)


def test_counted_operations_equal_a_real_run():
    cost = next(cost for cost in inspect("tiny")["images"] if cost["height"] == 768)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        load("tiny").model.get_image_features(torch.zeros(1, 3, 768, 768))
    assert cost["tower_gflop"] == round(counter.get_total_flops() / 1e9, 1) > 1


def test_trained_weights_need_16_bytes_and_frozen_weights_4():
    assert training_memory({"stage5": 10**9, "language_model": 3 * 10**9}, ("stage5",)) == 28.0


def test_info_shows_every_preset():
    for name in presets():
        result = CliRunner().invoke(app, ["info", name, "--json"])
        assert json.loads(result.stdout)["name"] == name


def test_info_of_the_bundled_model_includes_the_language_model():
    found = json.loads(CliRunner().invoke(app, ["info", "tiny", "--json"], catch_exceptions=False).stdout)
    assert found["parameters"]["language_model"] > 0


def test_other_model_types_are_rejected(tmp_path):
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a model of type llama, not convllava"):
        inspect(str(tmp_path))


def test_unknown_name_lists_the_presets():
    with pytest.raises(InputError, match=r"there is no model 'convllava-9b'.*convllava-1536-13b"):
        inspect("convllava-9b")


def test_costs_of_a_tower_equal_its_costs_in_a_model():
    alone = inspect_tower("L", [768, 1536])
    whole = inspect("convllava-1536-7b", [768, 1536])
    assert alone["parameters"] == sum(
        whole["parameters"][part] for part in whole["parameters"] if part not in ("projector", "language_model")
    )
    assert [cost["visual_tokens"] for cost in alone["images"]] == [144, 576]
    for one, other in zip(alone["images"], whole["images"], strict=True):
        assert 0 < other["tower_gflop"] - one["gflop"] < 0.04 * one["gflop"]  # the projector


def test_info_shows_a_tower_at_the_given_sides():
    result = CliRunner().invoke(app, ["info", "T", "--sides", "768,1024", "--json"])
    assert [cost["gflop"] for cost in json.loads(result.stdout)["images"]] == [122.5, 217.7]
    assert "144" in CliRunner().invoke(app, ["info", "T"]).stdout


@pytest.mark.parametrize(
    ("sides", "message"), [("a,b", "give positive integers"), ("100", "multiples of its stride 64")]
)
@pytest.mark.parametrize("name", ["T", "convllava-1024-t-0.5b"])
def test_invalid_sides_are_rejected(name, sides, message):
    result = CliRunner().invoke(app, ["info", name, "--sides", sides])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
