"""Evaluation while a stage trains: held-out loss, early stopping, averaged weights, drawn answers."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import picture
from killing import killed_after, killed_in
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import CHAT, DATA, DENSE, changed, log, logged, recipe, weights

from convllava.checkpoints import read
from convllava.data.collate import IGNORE, collate, pack
from convllava.data.synthetic_chat import ChatDataset
from convllava.errors import InputError
from convllava.inference import Assistant
from convllava.synthetic import World
from convllava.training import eval_callbacks
from convllava.training import train as engine
from convllava.training.datasets import make_held_out
from convllava.training.eval_callbacks import AverageWeights, loss_weight
from convllava.training.recipe import Adapter, Data, Evaluation, Source
from convllava.training.stage import StageRun

EVALUATED = dataclasses.replace(CHAT, steps=6, evaluation=Evaluation(every=2, samples=3, pictures=2))
STOPPED = dataclasses.replace(
    EVALUATED,
    steps=30,
    learning_rates={"projector": 2.0, "language_model": 0.3},  # much too high, so that the loss grows
    schedule="constant",
    evaluation=Evaluation(every=1, samples=3, pictures=0, patience=2),
)
AVERAGED = dataclasses.replace(EVALUATED, ema=0.9, learning_rates={"projector": 0.1, "language_model": 0.05})


def loss_on_held_out(plan, folder):
    model, processor = read(folder)
    dataset = make_held_out(StageRun(plan, 0, processor))
    with torch.no_grad():
        return model.eval()(**collate([dataset[index] for index in range(len(dataset))], 0)).loss.item()


def test_evaluation_does_not_change_training(tmp_path):
    engine.train(recipe(EVALUATED), tmp_path / "evaluated")
    engine.train(recipe(dataclasses.replace(EVALUATED, evaluation=None)), tmp_path / "plain")
    assert logged(tmp_path / "evaluated") == logged(tmp_path / "plain")
    assert [line["step"] for line in log(tmp_path / "evaluated") if "eval_loss" in line] == [2, 4, 6]
    events = EventAccumulator(str(tmp_path / "evaluated/tensorboard/0-chat"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("answers")] == [2, 4, 6]
    assert events.Scalars("eval/loss")[-1].value == pytest.approx(logged(tmp_path / "evaluated", "eval_loss")[-1])


def test_logged_eval_loss_equals_the_loss_of_saved_weights(tmp_path):
    for stage in (EVALUATED, AVERAGED):
        stage = dataclasses.replace(stage, batch_size=4, evaluation=Evaluation(every=3, samples=4, pictures=0))
        folder = tmp_path / f"ema-{stage.ema}"
        last = engine.train(recipe(stage), folder)
        assert logged(folder, "eval_loss")[-1] == pytest.approx(loss_on_held_out(recipe(stage), last), abs=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_loss_is_the_mean_over_tokens_of_all_batches(tmp_path, packing):
    data = dataclasses.replace(DATA, turns=5)  # sequences of different lengths
    stage = dataclasses.replace(EVALUATED, steps=2, packing=packing, data=data)
    plan = recipe(dataclasses.replace(stage, evaluation=Evaluation(every=2, samples=3, pictures=0)))
    last = engine.train(plan, tmp_path)
    assert logged(tmp_path, "eval_loss") == [pytest.approx(loss_on_held_out(plan, last), abs=1e-5)]


def test_loss_weight_excludes_samples_added_to_fill_a_batch(parts):
    dataset = ChatDataset(World(size=128, simple=True), parts[1], 3)
    items = [dataset[index] for index in range(3)]
    own = sum(int((item["labels"][1:] != IGNORE).sum()) for item in items[:2])
    for batch in (collate(items, 0), pack(items)):
        assert loss_weight(batch, 2) == own
        assert loss_weight(batch, 0) == 0


def test_early_stopping_keeps_the_best_weights(tmp_path):
    last = engine.train(recipe(STOPPED), tmp_path)
    losses = logged(tmp_path, "eval_loss")
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < STOPPED.steps
    assert loss_on_held_out(recipe(STOPPED), last) == pytest.approx(min(losses), rel=0.2)
    assert loss_on_held_out(recipe(STOPPED), last) < losses[-1]


def test_averaged_weights_follow_the_formula():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = AverageWeights(torch.nn.ParameterList([weight]), decay=0.5)
    expected = 0.0
    for step in range(1, 9):
        weight.data.fill_(float(step))
        average.on_step_end(None, type("State", (), {"global_step": step}), None)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.averages["0"].item() == pytest.approx(expected)
    with average.in_model():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 8


DROPPING = dataclasses.replace(AVERAGED, adapter=Adapter(rank=2, dropout=0.3))


@pytest.mark.parametrize("stage", [AVERAGED, STOPPED, DROPPING], ids=["average", "early stopping", "dropout"])
def test_resumed_run_equals_uninterrupted(tmp_path, stage):
    plan, whole, parts = recipe(stage, save_every=1), tmp_path / "whole", tmp_path / "parts"
    plan = dataclasses.replace(plan, workers=1 if stage is DROPPING else 0)  # loaders with workers draw a seed
    engine.train(plan, whole)
    steps = logged(whole)
    with killed_after(len(steps) - 1):
        engine.train(plan, parts)
    engine.train(plan, parts, resume=True)
    assert logged(parts) == steps
    assert logged(parts, "eval_loss") == logged(whole, "eval_loss")
    assert not changed(weights(whole / "0-chat"), weights(parts / "0-chat"))


def test_stopped_run_without_its_folder_takes_no_more_steps(tmp_path):
    plan, whole, parts = recipe(STOPPED, save_every=1), tmp_path / "whole", tmp_path / "parts"
    engine.train(plan, whole)
    with killed_in(engine.checkpoints, "write"):
        engine.train(plan, parts)
    engine.train(plan, parts, resume=True)
    assert logged(parts) == logged(whole)
    assert not changed(weights(whole / "0-chat"), weights(parts / "0-chat"))


def test_held_out_text_is_evaluated_without_pictures(tmp_path):
    data = dataclasses.replace(DATA, images=False)
    plan = recipe(dataclasses.replace(EVALUATED, data=data, evaluation=Evaluation(every=6, samples=2)))
    last = engine.train(plan, tmp_path)
    assert logged(tmp_path, "eval_loss") == [pytest.approx(loss_on_held_out(plan, last), abs=1e-4)]
    events = EventAccumulator(str(tmp_path / "tensorboard/0-chat"))
    events.Reload()
    assert events.Tags()["images"] == []


@pytest.mark.parametrize(("texts", "drawn"), [(["what?", "what " * 480], 1), (["what " * 480], 0)])
def test_questions_without_room_for_an_answer_are_not_drawn(parts, monkeypatch, texts, drawn):
    sheets = []
    monkeypatch.setattr(eval_callbacks, "draw_answers", lambda answered: sheets.append(len(answered)) or picture(8, 8))
    content = [[{"type": "image", "image": picture(64, 64)}, {"type": "text", "text": text}] for text in texts]
    questions = [([{"role": "user", "content": one}], "red") for one in content]
    writer = SimpleNamespace(add_image=lambda *_, **__: None)
    callback = eval_callbacks.SampleAnswers(Assistant(*parts), questions, writer)
    callback.on_evaluate(None, SimpleNamespace(global_step=1), None)
    assert sheets == [1] * drawn


def test_file_stages_are_evaluated_on_held_out_files(tmp_path):
    for name, count in (("train", 4), ("test", 2)):
        Image.new("RGB", (96, 64), "red").save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
        records = [{"id": f"{name}-{i}", "image": f"{name}.png", "conversations": turns} for i in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    held_out = Evaluation(every=2, samples=64, sources=[Source("test.json")], pictures=1)
    stage = dataclasses.replace(CHAT, data=Data(sources=[Source("train.json")]), evaluation=held_out)
    plan = recipe(stage, data_root=str(tmp_path))
    last = engine.train(plan, tmp_path / "run")
    losses = logged(tmp_path / "run", "eval_loss")
    assert len(losses) == 2
    assert losses[-1] == pytest.approx(loss_on_held_out(plan, last), abs=1e-4)
    with pytest.raises(InputError, match=r"give evaluation.sources if the stage has data.sources"):
        dataclasses.replace(stage, data=DATA)


def test_dense_stages_are_evaluated(tmp_path):
    stage = dataclasses.replace(DENSE, steps=24, evaluation=Evaluation(every=8, samples=2))
    engine.train(recipe(stage), tmp_path)
    losses = logged(tmp_path, "eval_loss")
    assert len(losses) == 3
    assert losses[-1] < losses[0]
