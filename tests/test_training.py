"""Training: which weights change, what is logged, and what is rejected before anything is written."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import psutil
import pytest
import torch
from training_runs import CHAT, DATA, DENSE, SUPERVISED, changed, log, logged, recipe, weights

import convllava
from convllava.errors import InputError
from convllava.model.part_names import part_of, parts_of
from convllava.training import train as engine
from convllava.training.initialise import initial_processor
from convllava.training.logging import processor_seconds
from convllava.training.objectives.build import build_trained_module
from convllava.training.optim import parameter_groups, train_only
from convllava.training.plan import plan
from convllava.training.recipe import ModelSpec, Recipe
from convllava.training.stage import resolve_stages


def test_only_the_named_parts_change_and_every_stage_loads(tmp_path):
    last = engine.train(recipe(DENSE, CHAT), tmp_path)
    assert last == tmp_path / "1-chat"
    assert isinstance(convllava.load(last).ask(torch.zeros(64, 64).numpy(), "what?", max_new_tokens=3), str)
    initial = dict(engine.initial_model(recipe(DENSE))[0].named_parameters())
    for before, after, trained in (
        (initial, weights(tmp_path / "0-dense"), set(DENSE.learning_rates)),
        (weights(tmp_path / "0-dense"), weights(tmp_path / "1-chat"), set(CHAT.learning_rates)),
    ):
        assert {part_of(name) for name in changed(before, after)} == trained - {"head"}


def test_log_has_one_line_per_step_with_true_counts(tmp_path):
    plan = recipe(DENSE, CHAT)
    engine.train(plan, tmp_path)
    lines = log(tmp_path)
    assert [(line["stage"], line["step"]) for line in lines] == [("dense", 1), ("dense", 2), ("dense", 3)] + [
        ("chat", step) for step in (1, 2, 3, 4)
    ]
    _, chat = resolve_stages(plan, initial_processor(plan))
    dataset = engine.make_dataset(chat)
    lengths = [len(dataset[number]["input_ids"]) for number in range(8)]
    assert [line["samples"] for line in lines[3:]] == [line["images"] for line in lines[3:]] == [2, 4, 6, 8]
    assert [line["tokens"] for line in lines[3:]] == [sum(lengths[:end]) for end in (2, 4, 6, 8)]
    cosine = (1 + math.cos(math.pi / 4)) / 2
    expected = {part: cosine * rate for part, rate in CHAT.learning_rates.items()}
    assert lines[3]["learning_rates"] == pytest.approx(expected), "the rates after the first of four steps"
    for folder in (tmp_path, tmp_path / "0-dense", tmp_path / "1-chat"):
        assert Recipe.load(folder / "recipe.yaml") == plan
    assert {path.parent.name for path in (tmp_path / "tensorboard").rglob("events*")} == {"0-dense", "1-chat"}


@pytest.mark.parametrize("stage", [DENSE, CHAT], ids=lambda stage: stage.name)
def test_first_logged_values_equal_the_model_outputs(tmp_path, stage):
    plan = recipe(stage)
    engine.train(plan, tmp_path, max_steps=1)
    model, processor = engine.initial_model(plan)
    (run,) = resolve_stages(plan, processor)
    engine.set_seed(plan.seed)
    module = build_trained_module(stage, model, processor).train()
    dataset = engine.make_dataset(run)
    batch = engine.make_collator(stage, processor)([dataset[number] for number in range(stage.batch_size)])
    outputs = module(**batch)
    (line,) = log(tmp_path)
    assert line["loss"] == pytest.approx(outputs["loss"].item(), abs=1e-4)
    for name in {"colour", "shape"} & outputs.keys():
        assert line[name] == pytest.approx(outputs[name].item(), abs=1e-4)
    assert ("colour" in line) == (stage is DENSE)


def test_stable_rates_fall_in_the_last_fifth_of_the_steps(tmp_path):
    stage = dataclasses.replace(CHAT, steps=10, warmup=0.2, schedule="stable")
    engine.train(recipe(stage), tmp_path)
    rates = [rate["projector"] / stage.learning_rates["projector"] for rate in logged(tmp_path, "learning_rates")]
    assert rates == pytest.approx([0.5, *[1.0] * 7, 0.5, 0.0])


def first_lines(folder, stages):
    """Return the first line of the log of each stage, trained on its own."""
    for number, stage in enumerate(stages):
        engine.train(recipe(stage), folder / str(number), max_steps=1)
    return [log(folder / str(number))[0] for number in range(len(stages))]


def test_attention_losses_count_by_their_weight(tmp_path):
    weights = (0.5, 1.0)
    one, two = first_lines(
        tmp_path, [dataclasses.replace(SUPERVISED, attention_supervision=weight) for weight in weights]
    )
    attention_losses = [one[name] for name in one if name.endswith("_attention")]
    assert sum(attention_losses) > 0
    assert two["loss"] - one["loss"] == pytest.approx(0.5 * sum(attention_losses), rel=1e-3)
    assert two["answer_loss"] == one["answer_loss"]


def test_prompt_loss_counts_by_its_weight(tmp_path):
    stages = [dataclasses.replace(CHAT, prompt_loss_weight=weight) for weight in (0.0, 0.5, 1.0)]
    losses = [line["loss"] for line in first_lines(tmp_path, stages)]
    assert losses[1] - losses[0] > 1  # the vocabulary's entropy is 7
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)


def test_max_steps_caps_every_stage(tmp_path):
    engine.train(recipe(DENSE, CHAT), tmp_path, max_steps=1)
    assert logged(tmp_path, "step") == [1, 1]


def test_processor_seconds_ignore_a_worker_that_has_ended(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    worker = psutil.Process(ended.pid)
    ended.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [worker])
    assert processor_seconds() == pytest.approx(sum(psutil.Process().cpu_times()[:2]), abs=0.5)


def test_every_parameter_belongs_to_one_part_and_one_group():
    model, _ = engine.initial_model(recipe(CHAT))
    parts = parts_of(model)
    assert list(parts) == ["stem", "stage1", "stage2", "stage3", "stage4", "stage5", "projector", "language_model"]
    assert sum(len(parameters) for parameters in parts.values()) == len(list(model.parameters()))
    train_only(model, CHAT.learning_rates)
    for decay, muon in itertools.product((0.0, 0.1), (False, True)):
        groups = parameter_groups(
            model, dataclasses.replace(CHAT, weight_decay=decay, optimizer="muon" if muon else "adamw")
        )
        assert any(group["muon"] for group in groups) == muon
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert {group["part"]: group["lr"] for group in groups} == CHAT.learning_rates
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in groups for p in group["params"] if decay)


def test_unknown_part_is_named():
    model, _ = engine.initial_model(recipe(CHAT))
    with pytest.raises(InputError, match=r"no part 'projecter'; did you mean projector\?"):
        train_only(model, ["projecter"])


def test_batch_not_divisible_by_processes_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size 2 does not divide among 3 processes"):
        engine.train(recipe(CHAT), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {"hiden_sizes": [8] * 5}}, r"model.vision: .*did you mean hidden_sizes\?"),
        ({"language": {"hiden_size": 8}}, r"model.language: .*did you mean hidden_size\?"),
        ({"pixels": {"max_pixel": 8}}, r"model.pixels: .*did you mean max_pixels\?"),
        (
            {"language": {"model_type": "gpt2", "n_embd": 32, "n_head": 2}, "vision": recipe(CHAT).model.vision},
            "gpt2 keeps its embeddings elsewhere than in embed_tokens",
        ),
        ({"vision_from": "a", "language_from": "b", "pixels": {"max_pixel": 8}}, r"did you mean max_pixels\?"),
        (
            {"vision_from": "a", "language_from": "b", "pixels": {"max_pixels": "8"}},
            "model.pixels: `max_pixels` must be a whole number",
        ),
        ({"language": {"model_type": "lama"}}, "transformers knows no model_type 'lama'"),
        (
            {"vision": {"depths": [1]}},
            r"settings of vision, language and pixels: Class validation .*four or more stages",
        ),
        (
            {"language": {"num_attention_heads": 7}},
            r"settings of vision, language and pixels: Class validation .*attention heads \(7\)",
        ),
        ({"language": {"hidden_act": "gely"}}, r"settings of vision, language and pixels: KeyError\('gely'\)"),
        ({"language": {"dtype": "foo"}}, r"settings of vision, language and pixels: .*no attribute 'foo'"),
        ({"checkpoint": "/no/where"}, "there is no model"),
    ],
)
def test_bad_models_are_rejected_before_writing(tmp_path, change, message):
    plan = dataclasses.replace(recipe(CHAT), model=ModelSpec(**change))
    with pytest.raises(InputError, match=message):
        engine.train(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": dataclasses.replace(DATA, kinds={"novel": 1.0})}, "`kinds` has 'novel'"),
        ({"data": dataclasses.replace(DATA, size=10)}, "size"),
        ({"learning_rates": {"projector": 1e-3}}, "the model has no part 'projector'"),
    ],
)
def test_plan_and_training_reject_the_same_stages(tmp_path, change, message):
    planned = recipe(dataclasses.replace(DENSE, **change))
    for attempt in (lambda: plan(planned), lambda: engine.train(planned, tmp_path / "out")):
        with pytest.raises(InputError, match=message):
            attempt()
    with pytest.raises(InputError, match="report_to: wandbb: "):
        plan(recipe(CHAT, report_to=["wandbb"]))
    assert not (tmp_path / "out").exists()


def test_dense_labels_need_patches_of_four_pixels(tmp_path):
    wide = {**recipe(DENSE).model.vision, "patch_size": 8}
    planned = dataclasses.replace(recipe(DENSE), model=dataclasses.replace(recipe(DENSE).model, vision=wide))
    with pytest.raises(InputError, match="for a patch_size of 4; the tower's is 8"):
        engine.train(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_logger_is_rejected_before_writing(tmp_path):
    with pytest.raises(InputError, match="report_to: wandbb: "):
        engine.train(recipe(CHAT, report_to=["wandbb"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_last_stage_is_rejected_before_writing(tmp_path):
    for change, message in (
        ({"learning_rates": {"stage9": 1e-3}}, "the model has no part 'stage9'"),
        ({"data": dataclasses.replace(DATA, kinds={"novel": 1.0})}, "`kinds` has 'novel'"),
    ):
        with pytest.raises(InputError, match=message):
            engine.train(recipe(DENSE, dataclasses.replace(CHAT, name="bad", **change)), tmp_path / "out")
        assert not (tmp_path / "out").exists()
