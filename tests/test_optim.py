"""Parameter groups of the optimizer: the layers of parts, and learning rates that decay from layer to layer."""

from __future__ import annotations

import dataclasses

import pytest
from training_runs import CHAT

from convllava.training.optim import layer_of, parameter_groups, train_only


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("lm_head.weight", 5),
        ("model.language_model.norm.weight", 5),
        ("base_model.model.model.language_model.final_layernorm.bias", 5),
        ("model.language_model.embedding_norm.weight", 5),
        ("model.language_model.layers.2.input_layernorm.weight", 2),
        ("model.language_model.embed_tokens.weight", -1),
        ("model.vision_tower.encoder.stages.2.downsampling_layer.0.weight", -1),
    ],
)
def test_last_norm_belongs_to_the_last_layer_in_all_families(name, layer):
    assert layer_of(name, 6) == layer


def test_layer_decay_lowers_the_rates_of_lower_layers(parts):
    model, _ = parts
    stage = dataclasses.replace(
        CHAT,
        learning_rates={"stage3": 1.0, "language_model": 1.0},
        layer_decays={"language_model": 0.5, "stage3": 0.1},
        weight_decay=0.1,
        weight_decays={"stage3": 0.0},
    )
    train_only(model, stage.learning_rates)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, stage)
    rates = {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}
    language = "model.language_model"
    assert rates[f"{language}.norm.weight"] == rates[f"{language}.layers.1.mlp.up_proj.weight"] == 1.0
    assert rates[f"{language}.layers.0.mlp.up_proj.weight"] == 0.5
    assert rates[f"{language}.embed_tokens.weight"] == 0.25
    tower = "model.vision_tower.encoder.stages.2"
    assert rates[f"{tower}.layers.0.pwconv1.weight"] == pytest.approx(0.1)
    assert rates[f"{tower}.downsampling_layer.1.weight"] == pytest.approx(0.01)
    assert {group["weight_decay"] for group in groups if group["part"] == "stage3"} == {0.0}
    assert {group["weight_decay"] for group in groups if group["part"] == "language_model"} == {0.0, 0.1}
    train_only(model, [])
    model.requires_grad_(True)
