"""LoRA adapters: the parts that train, the files of their folders, and merging."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import fresh, picture
from killing import killed_after
from training_runs import CHAT, changed, logged, recipe, weights

from convllava import checkpoints
from convllava.checkpoints.adapters import apply, base_of
from convllava.errors import InputError
from convllava.model.part_names import part_of
from convllava.training import train as engine
from convllava.training.recipe import Adapter, ModelSpec, Recipe, Stage
from convllava.training.stage import StageRun

BOTH = Adapter(rank=4, parts=["language_model", "stage4"])
STAGE = Stage(
    "lora",
    4,
    {"stage4": 1e-2, "stage5": 1e-2, "projector": 1e-2, "language_model": 1e-2},
    CHAT.data,
    batch_size=2,
    adapter=BOTH,
)


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "DoRA"])
def run(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("run")
    adapter = Adapter(rank=4, parts=BOTH.parts, dora=request.param)
    engine.train(recipe(CHAT, replaced(adapter=adapter)), folder)
    return folder


def replaced(**changes):
    return Stage(**{**vars(STAGE), **changes})


def logits(model, processor):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(96, 130)}, {"type": "text", "text": "?"}]}
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_adapter_folder_is_small_and_loads_the_whole_model(run):
    folder = run / "1-lora"
    assert (folder / "adapter_model.safetensors").stat().st_size < (run / "0-chat/model.safetensors").stat().st_size
    assert not (folder / "model.safetensors").exists()
    trained = {part_of(name) for name in changed(weights(run / "0-chat"), weights(folder))}
    assert trained == {"stage4", "stage5", "projector", "language_model"}


def test_merged_logits_equal_adapter(run, tmp_path):
    base, processor = checkpoints.read(run / "0-chat")
    untouched = logits(base.eval(), processor)
    unmerged = logits(apply(base, run / "1-lora", merge=False), processor)
    checkpoints.merge(run / "1-lora", tmp_path / "merged", "float32")
    merged = logits(checkpoints.read(tmp_path / "merged")[0].eval(), processor)
    torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=0)
    assert (merged - untouched).abs().max() > 0.01


def test_moved_run_finds_its_base_and_missing_base_is_named(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    assert base_of(moved / "1-lora") == str((moved / "0-chat").resolve())
    (moved / "0-chat").rename(moved / "elsewhere")
    with pytest.raises(InputError, match="which is not here; give its folder as `base`"):
        checkpoints.read(moved / "1-lora")
    checkpoints.merge(moved / "1-lora", tmp_path / "merged", base=str(moved / "elsewhere"))
    assert checkpoints.read(tmp_path / "merged")[0].dtype == torch.float32


def test_adapter_behind_a_symbolic_link_equals_its_target(tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    last = engine.train(recipe(replaced(steps=1)), tmp_path / "link/run")
    assert base_of(last) == str(tmp_path / "far/away/run/base")
    assert not changed(weights(last), weights(tmp_path / "far/away/run" / last.name))
    assert changed(weights(last), weights(tmp_path / "far/away/run/base"))


def test_bundled_model_wins_over_a_folder_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    _, processor = fresh()
    assert StageRun(Recipe("fine", [STAGE], ModelSpec(checkpoint="tiny")), 0, processor, tmp_path).base == "tiny"


def test_four_bit_after_an_adapter_is_rejected_before_training(tmp_path):
    four = replaced(adapter=Adapter(four_bit=True), learning_rates={"language_model": 1e-2}, name="four")
    with pytest.raises(InputError, match="four_bit cannot follow an adapter"):
        engine.train(recipe(STAGE, four), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_next_stage_starts_from_the_merged_adapter(run, tmp_path):
    plan = recipe(STAGE, CHAT)
    last = engine.train(plan, tmp_path)
    assert (tmp_path / "base/model.safetensors").exists()
    trained = {part_of(name) for name in changed(weights(tmp_path / "0-lora"), weights(last))}
    assert trained.isdisjoint(("stem", "stage4"))


def test_resumed_adapter_equals_uninterrupted(tmp_path):
    plan = recipe(replaced(adapter=Adapter(rank=4, dropout=0.1, parts=BOTH.parts)), save_every=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    engine.train(plan, whole)
    with killed_after(3):
        engine.train(plan, parts)
    engine.train(plan, parts, resume=True)
    assert logged(parts) == logged(whole)
    assert not changed(weights(whole / "0-lora"), weights(parts / "0-lora"))


def test_bundled_model_is_the_base_by_name(tmp_path):
    stage = replaced(steps=1, learning_rates={"projector": 1e-3, "language_model": 1e-3}, adapter=Adapter(rank=2))
    plan = engine.Recipe("fine", [stage], ModelSpec(checkpoint="tiny"), workers=0)
    engine.train(plan, tmp_path)
    assert base_of(tmp_path / "0-lora") == "tiny"
    assert (tmp_path / "0-lora/adapter_model.safetensors").stat().st_size < 3_000_000
    assert checkpoints.read(tmp_path / "0-lora")[0].num_parameters() > 1e6


def test_four_bit_adapter_merges_into_the_whole_model(tmp_path):
    stage = replaced(adapter=Adapter(rank=4, four_bit=True), learning_rates={"stage5": 1e-2, "language_model": 1e-2})
    last = engine.train(recipe(CHAT, stage), tmp_path)
    trained = {part_of(name) for name in changed(weights(tmp_path / "0-chat"), weights(last))}
    assert trained == {"stage5", "language_model"}
    assert not hasattr(checkpoints.configuration(last), "quantization_config")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": Adapter(parts=["projector"])}, "projector takes no adapter"),
        ({"adapter": Adapter(parts=["language_model", "stage3"])}, "give stage3 a learning rate"),
        ({"adapter": Adapter(parts=["stage4"])}, "add language_model to parts, or remove it from learning_rates"),
    ],
)
def test_invalid_adapters_are_rejected_before_writing(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        engine.train(recipe(replaced(**changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("adapter_model.safetensors", b"{" * 200), ("adapter_model.bin", b"")], ids=["cut", "empty"]
)
def test_damaged_adapters_give_a_one_line_error(run, tmp_path, name, content):
    shutil.copytree(run / "1-lora", tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    (tmp_path / "lora" / name).write_bytes(content)
    with pytest.raises(InputError, match="does not load as an adapter of its base: ") as rejection:
        checkpoints.read(tmp_path / "lora", base=str(run / "0-chat"))
    assert "\n" not in str(rejection.value)


def test_convert_rejects_adapters_and_merge_whole_models(run, tmp_path):
    with pytest.raises(InputError, match="is an adapter; write it and its base"):
        checkpoints.convert(run / "1-lora", tmp_path / "new")
    with pytest.raises(InputError, match="is not an adapter's folder"):
        checkpoints.merge(run / "0-chat", tmp_path / "new")
    with pytest.raises(InputError, match="adapter needs the objective chat"):
        replaced(objective="align")
