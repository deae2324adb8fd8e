"""Micro-batches within a token and pixel budget: no sample is lost, no limit is exceeded, the order is reproducible."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import picture
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import killed_after, killed_after_findings
from training_runs import ONE, SMALLEST, TWO, logged, train

from convllava.data import storage
from convllava.data.batching import UNUSABLE, MicroBatchBudget, MicroBatchDataset, MicroBatchPlan
from convllava.data.formats import Records
from convllava.data.mixture import Mixture, MixtureSource
from convllava.errors import InputError
from convllava.training import batch_costs
from convllava.training import train as engine
from convllava.training.batch_costs import in_micro_batches, plan_steps
from convllava.training.datasets import make_collator, make_dataset
from convllava.training.initialise import initial_processor
from convllava.training.plan import plan
from convllava.training.recipe import Budget, Data, Evaluation, Recipe, Source, Stage
from convllava.training.stage import StageRun

BUDGET = Budget(tokens=150, pixels=4 * 128 * 128, micro_batches=2)


class Empty(Records):
    """Records that are counted but never read."""

    name = "empty"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("a plan reads no record")


@st.composite
def planned(draw: Any) -> tuple[MicroBatchPlan, MicroBatchBudget]:
    costs = st.tuples(st.integers(1, 60) | st.just(UNUSABLE), st.sampled_from([0, 0, 100, 300]))
    sources = draw(st.lists(st.lists(costs, min_size=1, max_size=40), min_size=1, max_size=3))
    arrays = [np.array([(5, 0), *(cost if cost[0] > 0 else (UNUSABLE, 0) for cost in source)]) for source in sources]
    limits = MicroBatchBudget(
        micro_batches=draw(st.integers(1, 4)),
        samples=draw(st.integers(1, 8)),
        tokens=draw(st.none() | st.integers(60, 200)),
        pixels=draw(st.none() | st.integers(300, 900)),
        packed=draw(st.booleans()),
    )
    mixture = Mixture([MixtureSource(Empty(len(array))) for array in arrays], draw(st.integers(0, 3)))
    return MicroBatchPlan(mixture, arrays, limits), limits


def cost_at(planned_batches: MicroBatchPlan, position: int) -> tuple[int, int]:
    """Return the cost of the sample that training takes there: the next usable one."""
    source, record = planned_batches.mixture[position]
    found = planned_batches.costs[planned_batches.firsts[source] + record]
    return tuple(found.tolist()) if found[0] != UNUSABLE else cost_at(planned_batches, position + 1)


@settings(max_examples=60)
@given(planned())
def test_no_micro_batch_exceeds_its_budget_and_every_position_is_used_once(both):
    planned_batches, limits = both
    steps = planned_batches.steps_of(3 * len(planned_batches.mixture))
    found = planned_batches.first(steps)
    assert len(found) == steps * limits.micro_batches
    for chosen in found:
        tokens, pixels = zip(*(cost_at(planned_batches, position) for position in chosen), strict=True)
        computed = sum(tokens) if limits.packed else len(tokens) * max(tokens)
        assert 1 <= len(chosen) <= limits.samples
        assert computed <= (limits.tokens or computed)
        assert sum(pixels) <= (limits.pixels or sum(pixels))
    counts = Counter(position for chosen in found for position in chosen)
    assert max(counts.values()) == 1
    # Positions that are missing were left over from a group: less than a step, used in the next group.
    left = [position for position in range(3 * len(planned_batches.mixture)) if position not in counts]
    assert len(left) < planned_batches.group + limits.micro_batches * limits.samples
    assert found == MicroBatchPlan(
        planned_batches.mixture, np.split(planned_batches.costs, planned_batches.firsts[1:]), limits
    ).first(steps)


@settings(max_examples=30)
@given(planned(), st.integers(1, 30))
def test_a_shorter_training_equals_the_beginning_of_a_longer_one(both, steps):
    planned_batches, limits = both
    assert planned_batches.first(steps) == planned_batches.first(steps + 5)[: steps * limits.micro_batches]


def test_micro_batches_of_a_step_have_similar_cost_and_text_is_separate():
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 1000, 4000)
    pixels = np.where(draw.random(4000) < 0.3, 0, 500 * tokens)
    mixture = Mixture([MixtureSource(Empty(4000))])
    passes = MicroBatchPlan(
        mixture, [np.stack([tokens, pixels], axis=1)], MicroBatchBudget(4, 64, tokens=8000, pixels=4_000_000)
    )
    found = passes.first(passes.steps_of(4000))
    own = [np.array([passes.costs[mixture[place][1]] for place in chosen]) for chosen in found]
    useful = sum(chosen[:, 0].sum() for chosen in own) / sum(len(chosen) * chosen[:, 0].max() for chosen in own)
    assert useful > 0.95
    mixed = [bool((chosen[:, 1] == 0).any() and (chosen[:, 1] > 0).any()) for chosen in own]
    assert sum(mixed) < 0.05 * len(mixed)
    positions = np.array([len(chosen) * chosen[:, 0].max() for chosen in own]).reshape(-1, 4)
    assert np.median(positions.max(1) / positions.min(1)) < 1.25


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(64, 64), (64, 128), (128, 64), (128, 128)]):
        picture(*size, seed=number).save(tmp_path / "images" / f"{number}.png")
    turns = [{"from": "human", "value": "what is it?"}]
    records: list[dict[str, Any]] = []
    for number in range(24):
        record = {"id": f"s{number}", "conversations": [*turns, {"from": "gpt", "value": "red " * (1 + number % 7)}]}
        records.append(record | ({"image": f"{number % 4}.png"} if number % 3 else {}))
    records[5]["image"] = "gone.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def recipe(folder: Path, **settings: Any) -> Recipe:
    data = Data(sources=[Source("data.json", "images")], max_skipped=0.5)
    trains = {"stage5": 1e-3, "projector": 1e-3, "language_model": 1e-3}
    stage = Stage("files", None, trains, data, epochs=2, batch_size=16, budget=BUDGET)
    return Recipe("files", [dataclasses.replace(stage, **settings)], SMALLEST, data_root=str(folder), workers=0)


@pytest.mark.parametrize("packing", [False, True])
def test_the_batches_that_training_gets_are_within_the_budget(folder, packing):
    planned = plan_steps(recipe(folder, packing=packing), folder / "run")
    processor = initial_processor(planned)
    run = StageRun(planned, 0, processor, folder / "run")
    collate = make_collator(planned.stages[0], processor)
    passes = in_micro_batches(run, make_dataset(run))
    assert isinstance(passes, MicroBatchDataset)
    for number in range(len(passes)):
        batch = collate([passes[number]])
        assert batch["input_ids"].numel() <= BUDGET.tokens
        assert sum(image[0].numel() for image in batch.get("pixel_values", ())) <= BUDGET.pixels
    assert len(passes) == planned.stages[0].steps * BUDGET.micro_batches
    assert len(passes.positions) >= 48


def test_costs_are_measured_once_for_each_version_of_a_file(folder, monkeypatch):
    measured = []
    measure = batch_costs.measure
    monkeypatch.setattr(batch_costs, "measure", lambda *all: measured.append(1) or measure(*all))
    stages = recipe(folder).stages
    twice = dataclasses.replace(recipe(folder), stages=[*stages, dataclasses.replace(stages[0], name="again")])
    engine.train(twice, folder / "one", max_steps=1)
    plan_steps(twice, folder / "two")
    assert measured == [1]
    assert len(list((folder / ".cache" / "costs").glob("*.npy"))) == 1
    (folder / "data.json").write_text((folder / "data.json").read_text() + "\n")
    plan_steps(twice, folder / "three")
    assert measured == [1, 1]
    plan_steps(recipe(folder, pixels={"max_pixels": 64 * 128}), folder / "four")
    assert measured == [1, 1, 1]


def test_only_one_of_two_simultaneous_runs_measures(folder, monkeypatch):
    add, others = batch_costs.FindingsLog.add, []

    def while_another_starts(self, job, findings):
        monkeypatch.setattr(batch_costs.FindingsLog, "add", add)
        others.append(Thread(target=plan_steps, args=(recipe(folder), folder / "other")))
        others[0].start()
        others[0].join(timeout=2)
        add(self, job, findings)

    monkeypatch.setattr(batch_costs.FindingsLog, "add", while_another_starts)
    one = plan_steps(recipe(folder), folder / "one")
    others[0].join()
    (path,) = (folder / ".cache" / "costs").glob("*.npy")
    assert (np.load(path)[:, 0] != 0).all()
    assert plan_steps(recipe(folder), folder / "later") == one


def test_a_process_with_other_files_than_the_first_one_is_rejected(folder, monkeypatch):
    monkeypatch.setattr(batch_costs, "is_first_process", lambda: False)
    monkeypatch.setattr(batch_costs, "_START_SECONDS", 0.0)
    monkeypatch.setattr(batch_costs, "_POLL_SECONDS", 0.01)
    with pytest.raises(
        InputError, match=r"source data.json: the first process measures other files than this one; give all"
    ):
        plan_steps(recipe(folder), folder / "run")


def test_a_killed_measurement_is_resumed(folder, monkeypatch):
    with killed_after_findings(10):
        plan_steps(recipe(folder), folder / "run")
    add, seen = batch_costs.FindingsLog.add, []
    monkeypatch.setattr(batch_costs.FindingsLog, "add", lambda *all: seen.extend(all[2]) or add(*all))
    plan_steps(recipe(folder), folder / "run")
    assert [finding.index for finding in seen] == list(range(10, 24))


def test_a_resumed_run_equals_an_uninterrupted_one_and_skips_bad_samples(folder):
    whole = dataclasses.replace(recipe(folder), save_every=2)
    engine.train(whole, folder / "whole")
    with killed_after(3):
        engine.train(whole, folder / "parts")
    engine.train(whole, folder / "parts", resume=True)
    assert logged(folder / "parts") == logged(folder / "whole")
    assert "gone.png" in (folder / "parts" / "skipped.jsonl").read_text()
    with pytest.raises(InputError, match=r"another recipe \(.*budget.tokens: 150 -> 160"):
        engine.train(recipe(folder, budget=dataclasses.replace(BUDGET, tokens=160)), folder / "parts", resume=True)


def test_two_processes_have_the_losses_of_one(folder):
    held_out = Evaluation(every=2, samples=5, sources=[Source("data.json", "images")], pictures=0)
    for name, program in (("two", TWO), ("one", ONE)):
        train(recipe(folder, evaluation=held_out), folder / name, program)
    for key in ("loss", "eval_loss"):
        one, two = (logged(folder / name, key) for name in ("one", "two"))
        assert two == pytest.approx(one, abs=1e-4)
        assert one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Data(), "epochs": None, "steps": 1}, "budget needs data from files"),
        ({"gradient_accumulation_steps": 2}, "micro_batches replaces gradient_accumulation_steps"),
        ({"answer_length_weighting": 0.5}, "prompt_loss_weight are means within one micro-batch"),
        ({"prompt_loss_weight": 0.5}, "prompt_loss_weight are means within one micro-batch"),
        ({"batch_size": 15}, "batch_size 15 is not a multiple of budget.micro_batches 2"),
    ],
)
def test_impossible_budgets_are_rejected(folder, change, message):
    with pytest.raises(InputError, match=message):
        recipe(folder, **change)


def test_a_sample_larger_than_the_budget_is_named_before_anything_is_written(folder):
    for budget, message in (
        (Budget(tokens=15), "budget.tokens 15 is less than record"),
        (Budget(pixels=9000), "16,384"),
    ):
        with pytest.raises(InputError, match=rf"stage files: .*{message}"):
            engine.train(recipe(folder, budget=budget), folder / "run")
        assert not (folder / "run").exists()


def test_micro_batches_that_processes_cannot_share_are_rejected(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        InputError, match=r"budget\.micro_batches 2 does not divide among 4 processes; make it a multiple of 4"
    ):
        engine.train(recipe(folder), folder / "run")


def test_a_plan_measures_nothing_and_counts_memory_within_the_budget(folder):
    found, unbounded = plan(recipe(folder))["stages"][0], plan(recipe(folder, budget=None))["stages"][0]
    assert (found["steps"], found["epochs"]) == (None, 2)
    assert unbounded["steps"] == 3
    assert not (folder / ".cache").exists()
    sizes = {"tokens": 4096, "pixels": 1024 * 1024}
    wide = dataclasses.replace(recipe(folder).model, pixels={"max_pixels": 1024 * 1024})
    tight, loose = (
        plan(dataclasses.replace(recipe(folder, budget=budget, learning_rates={"stem": 1e-3}), model=wide))["stages"][0]
        for budget in (Budget(**sizes), Budget(**sizes | {"pixels": 8 * 1024 * 1024}))
    )
    assert 0 < tight["memory_gb"]["tower"] < loose["memory_gb"]["tower"]


@pytest.mark.parametrize("root", ["", "memory://stamps/"])
def test_a_stamp_changes_with_the_file(tmp_path, root):
    address = root + str(tmp_path / "a.json")
    found = []
    for content in (b"[]", b"[1]"):
        with fsspec.open(address, "wb") as file:
            file.write(content)
        found += [storage.stamp(address), storage.stamp(address)]
    assert found[0] == found[1] != found[2] == found[3]


def test_a_stamp_changes_if_the_file_system_identifies_files_by_address(monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "ukey", lambda self, path: path)  # as that of http does
    found = []
    for content in (b"[]", b"[1]"):
        with fsspec.open("memory://web/a.json", "wb") as file:
            file.write(content)
        found.append(storage.stamp("memory://web/a.json"))
    assert found[0] != found[1]


def test_micro_batch_items_are_those_of_their_positions():
    items = MicroBatchDataset(list(range(10)), [[3, 1], [0], [2, 9, 4]])
    assert [items[number] for number in range(len(items))] == [[3, 1], [0], [2, 9, 4]]
