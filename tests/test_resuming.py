"""Killed runs, full disks and several processes: the result equals that of an uninterrupted run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from killing import die, killed_after, killed_in
from training_runs import (
    ALIGN,
    ALONE,
    CHAT,
    DENSE,
    HEADS,
    LOW,
    ONE,
    SUPERVISED,
    TWO,
    changed,
    command,
    log,
    logged,
    recipe,
    train,
    weights,
)

from convllava.errors import ConfigError
from convllava.training import train as engine
from convllava.training.objectives.auxiliary_heads import HEADS_FILE
from convllava.training.recipe import Adapter, Evaluation, Recipe, Stage


@pytest.mark.parametrize("stage", [DENSE, ALIGN, CHAT, HEADS, LOW], ids=lambda stage: stage.name)
def test_resumed_equals_uninterrupted(tmp_path, stage):
    plan = recipe(stage, save_every=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    engine.train(plan, whole)
    with killed_after(2):
        engine.train(plan, parts)
    assert not (parts / f"0-{stage.name}").exists()
    engine.train(plan, parts, resume=True)
    assert logged(parts) == logged(whole)
    spent = logged(parts, "processor")
    assert spent[0] > 0
    assert spent == sorted(spent), "processor seconds add up over resumed parts"
    assert not changed(weights(whole / f"0-{stage.name}"), weights(parts / f"0-{stage.name}"))
    heads = [run / f"0-{stage.name}" / HEADS_FILE for run in (whole, parts)]
    assert {path.exists() for path in heads} == {stage.position_label_weight > 0}
    if stage.position_label_weight:
        assert heads[0].read_bytes() == heads[1].read_bytes()


def test_incomplete_checkpoint_is_never_used(tmp_path):
    plan = recipe(CHAT, save_every=2)
    with killed_in(engine.StageTrainer, "_save_rng_state"):
        engine.train(plan, tmp_path)
    progress = tmp_path / ".0-chat.progress"
    assert list(progress.glob("checkpoint-*")) == []
    engine.train(plan, tmp_path, resume=True)
    assert (tmp_path / "0-chat").exists()
    assert not progress.exists()


def test_full_disk_keeps_the_last_complete_checkpoint(tmp_path):
    plan, out = recipe(dataclasses.replace(CHAT, steps=6), save_every=2), tmp_path / "out"
    limit = limit_file_size(200_000)
    full = subprocess.run(command(plan, out), capture_output=True, text=True, preexec_fn=limit, env=ALONE)
    assert full.returncode == 2
    assert "the checkpoint of step 2 cannot be written" in full.stderr
    assert "this stage has no earlier one" in full.stderr
    assert "Traceback" not in full.stderr
    assert list((out / ".0-chat.progress").iterdir()) == []
    train(plan, out)
    assert logged(out, "step") == [1, 2, 3, 4, 5, 6]


def limit_file_size(size):
    """Return a function for a new process that makes larger writes fail, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("program", [ONE, TWO], ids=["1", "2"])
def test_run_killed_twice_equals_an_uninterrupted_one(tmp_path, program):
    plan = recipe(dataclasses.replace(CHAT, steps=8), save_every=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(plan, whole, program)
    kill_when(lambda: len(log(killed)) >= 3, command(plan, killed, program))
    assert not (killed / "0-chat").exists()
    kill_when(lambda: any(killed.glob(".0-chat.progress/partial/*")), command(plan, killed, program))
    train(plan, killed, program)
    assert logged(killed) == logged(whole)
    assert not changed(weights(whole / "0-chat"), weights(killed / "0-chat"))


def kill_when(ready, started):
    """Start a command, and kill all its processes as soon as `ready`; fail if it ends before."""
    process = subprocess.Popen(started, env=ALONE, start_new_session=True)
    while process.poll() is None and not ready():
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_two_processes_have_the_losses_of_one_in_every_stage(tmp_path):
    held_out = Evaluation(every=3, samples=5, pictures=0)  # the second process has none of them in its last batch
    plan = recipe(dataclasses.replace(CHAT, steps=3, batch_size=4, evaluation=held_out), SUPERVISED)
    train(plan, tmp_path / "one", ONE)
    train(plan, tmp_path / "two", TWO)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2, 3, 3, 1, 2, 3, 4]
    for a, b in zip(one[:4], two[:4], strict=True):
        key = "eval_loss" if "eval_loss" in a else "loss"
        assert a[key] == pytest.approx(b[key], abs=1e-4)


def start_run(plan: Recipe, run: Path) -> None:
    """Leave the folder of a run that has only its recipe."""
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(plan.dump())


def test_run_is_not_overwritten_or_resumed_with_another_recipe(tmp_path, monkeypatch):
    start_run(recipe(CHAT), tmp_path)
    resumed = []
    monkeypatch.setattr(engine, "train_stage", lambda run, model: resumed.append(run.index))
    with pytest.raises(ConfigError, match="already holds a run; continue it with `resume`"):
        engine.train(recipe(CHAT), tmp_path)
    with pytest.raises(ConfigError, match=r"another recipe \(seed: 0 -> 5\); resume with the same recipe"):
        engine.train(recipe(CHAT, seed=5), tmp_path, resume=True)
    assert resumed == []
    engine.train(recipe(CHAT), tmp_path, resume=True)
    assert resumed == [0]


def test_settings_without_effect_on_weights_may_change_on_resume(tmp_path):
    stage = dataclasses.replace(CHAT, adapter=Adapter(rank=2, dropout=0.3), evaluation=Evaluation(2, 2, pictures=0))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    engine.train(recipe(stage), whole)
    with killed_after(2):
        engine.train(recipe(stage, save_every=2), parts)
    tolerant = dataclasses.replace(stage.data, max_skipped=0.5)
    changed_stage = dataclasses.replace(stage, data=tolerant, evaluation=Evaluation(2, 2, pictures=1))
    plan = dataclasses.replace(recipe(changed_stage, save_every=1), workers=1)
    with killed_after(3):
        engine.train(plan, parts, resume=True)
    assert (parts / ".0-chat.progress" / "checkpoint-3").exists()
    assert Recipe.load(parts / "recipe.yaml") == plan
    engine.train(plan, parts, resume=True)
    assert logged(parts) == logged(whole)
    assert not changed(weights(whole / "0-chat"), weights(parts / "0-chat"))


def test_run_with_old_keys_is_resumed(tmp_path):
    plan = recipe(dataclasses.replace(SUPERVISED, answer_length_weighting=0.5), save_every=2)
    with killed_after(2):
        engine.train(plan, tmp_path)
    text = plan.dump()
    for old, new in Stage.OLD_KEYS.items():
        text = text.replace(f"  {new}:", f"  {old}:")
    assert "guidance: 0.5" in text
    (tmp_path / "recipe.yaml").write_text(text)
    engine.train(plan, tmp_path, resume=True)
    assert logged(tmp_path, "step") == [1, 2, 3, 4]
    assert (tmp_path / "recipe.yaml").read_text() == plan.dump()


def test_used_folder_is_rejected_before_anything_is_measured(tmp_path, monkeypatch):
    start_run(recipe(CHAT), tmp_path)
    monkeypatch.setattr(engine, "plan_steps", die)
    with pytest.raises(ConfigError, match="already holds a run"):
        engine.train(recipe(CHAT), tmp_path)


def test_resumed_run_starts_after_the_last_complete_stage(tmp_path, monkeypatch):
    stages = [dataclasses.replace(CHAT, name=name) for name in "abcd"]
    start_run(recipe(*stages), tmp_path)
    engine.checkpoints.write(*engine.initial_model(recipe(CHAT)), tmp_path / "2-c")  # 0-a and 1-b were deleted
    trained = []
    monkeypatch.setattr(engine, "train_stage", lambda run, model: trained.append(run.index))
    engine.train(recipe(*stages), tmp_path, resume=True)
    assert trained == [3]


def test_incomplete_last_line_of_the_log_is_dropped(tmp_path):
    engine.train(recipe(DENSE), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "chat", "in')
    (tmp_path / "recipe.yaml").unlink()
    engine.train(recipe(DENSE, CHAT), tmp_path)
    assert logged(tmp_path, "step") == [1, 2, 3, 1, 2, 3, 4]
