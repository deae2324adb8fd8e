"""A model that two processes share (FSDP2) has the losses and weights of one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import picture
from training_runs import CHAT, ONE, TORCHRUN, logged, recipe, train, weights

from convllava.errors import InputError
from convllava.training.distributed import check_sharding, deepspeed_config
from convllava.training.recipe import Data, Evaluation, Source

SHARED = (*TORCHRUN, str(Path(__file__).parent / "sharded_on_cpu.py"))


def test_fsdp_equals_one_process_if_some_batches_have_no_image(tmp_path):
    picture(70, 130).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(number), "conversations": turns} for number in range(6)]
    records[0]["image"] = "a.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    stage = dataclasses.replace(CHAT, data=Data(sources=[Source("data.json")]))
    for name, program, sharding in (("one", ONE, "none"), ("two", SHARED, "fsdp")):
        plan = recipe(stage, data_root=str(tmp_path), save_every=2, sharding=sharding)
        train(plan, tmp_path / name, program)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=1e-4)
    whole, shared = weights(tmp_path / "one/0-chat"), weights(tmp_path / "two/0-chat")
    assert whole.keys() == shared.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(shared[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "muon"}, "optimizer muon needs a whole model in each process"),
        ({"ema": 0.9}, "ema needs a whole model"),
        ({"evaluation": Evaluation(pictures=0, patience=2)}, "evaluation.patience needs a whole model"),
    ],
)
def test_settings_that_need_a_whole_model_are_rejected(change, message):
    with pytest.raises(InputError, match=message):
        check_sharding(recipe(dataclasses.replace(CHAT, **change), sharding="fsdp"), 2)
    check_sharding(recipe(CHAT, sharding="fsdp"), 2)


def test_zero_without_deepspeed_is_rejected():
    with pytest.raises(InputError, match="zero3 needs DeepSpeed; pip install deepspeed, or set it to fsdp"):
        check_sharding(recipe(CHAT, sharding="zero3"), 2)


def test_only_zero_3_gathers_weights_to_save_them():
    assert deepspeed_config(3)["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert "stage3_gather_16bit_weights_on_model_save" not in deepspeed_config(2)["zero_optimization"]
