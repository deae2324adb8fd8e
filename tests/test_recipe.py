"""Recipes: reading and writing YAML, overrides, old keys, and what is rejected."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from convllava.errors import ConfigError
from convllava.training.recipe import Budget, Data, Recipe, Stage

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("**/*.yaml"))
MINIMAL = "name: x\nstages:\n  - {name: a, steps: 3, learning_rates: {projector: 1e-3}}\n"
OLD = """
name: old
stages:
  - name: dense
    objective: dense
    steps: 3
    batch_size: 4
    accumulate: 2
    trains: {stem: 1e-3, head: 1e-3}
    data: {sheets: 0.5, darkest: 0.4}
  - name: chat
    steps: 3
    trains: {projector: 1e-3, head: 1e-3}
    data: {casual: 0.25}
    guidance: 0.5
    marks: 0.25
    letters: 0.125
    questions: 0.75
    balance: 0.375
  - name: files
    epochs: 2
    trains: {projector: 1e-3}
    budget: {tokens: 100, passes: 2}
    data: {sources: [{path: a.json}]}
"""


def write(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def changed(settings: str) -> str:
    """Return the minimal recipe with more settings of its stage."""
    return MINIMAL.replace("steps: 3", f"steps: 3, {settings}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_survive_a_round_trip(path, tmp_path, caplog):
    recipe = Recipe.load(path)
    assert not caplog.records
    assert Recipe.load(write(tmp_path, recipe.dump())) == recipe


@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-9, 1.0),
    captions=st.floats(0, 1),
    kinds=st.none() | st.dictionaries(st.sampled_from(["scene", "sign"]), st.floats(0.1, 9), min_size=1),
    schedule=st.sampled_from(["cosine", "linear", "constant", "stable"]),
)
def test_any_recipe_survives_a_round_trip(tmp_path_factory, steps, rate, captions, kinds, schedule):
    data = Data(captions=captions, kinds=kinds)
    stage = Stage("s", steps, {"projector": rate}, data, schedule=schedule)
    recipe = Recipe("r", [stage, dataclasses.replace(stage, name="t", objective="dense")])
    assert Recipe.load(write(tmp_path_factory.mktemp("recipe"), recipe.dump())) == recipe


def test_old_keys_give_the_same_recipe_and_one_warning(tmp_path, caplog):
    new = OLD
    for kind in (Data, Budget, Stage):
        for before, after in kind.OLD_KEYS.items():
            assert f"{before}: " in OLD
            new = re.sub(rf"\b{before}: ", f"{after}: ", new)
    expected = Recipe.load(write(tmp_path, new))
    assert not caplog.records
    recipe = Recipe.load(write(tmp_path, OLD))
    assert recipe == expected
    (warning,) = caplog.messages
    for kind in (Data, Budget, Stage):
        assert all(f"{before} is now {after}" in warning for before, after in kind.OLD_KEYS.items())
    assert "\n" not in warning
    written = yaml.safe_load(recipe.dump())["stages"]
    for kind, section in ((Stage, written[1]), (Data, written[1]["data"]), (Budget, written[2]["budget"])):
        assert not kind.OLD_KEYS.keys() & section.keys()
        assert set(kind.OLD_KEYS.values()) <= section.keys()


@pytest.mark.parametrize("text", [MINIMAL, MINIMAL.replace("learning_rates", "trains")])
@pytest.mark.parametrize("key", ["learning_rates", "trains"])
def test_overrides_take_old_and_new_keys_of_old_and_new_recipes(tmp_path, caplog, text, key):
    overrides = [f"stages.a.{key}.stage5=2e-3", "stages.0.data={casual: 0.5}"]
    stage = Recipe.load(write(tmp_path, text), overrides).stages[0]
    assert stage.learning_rates == {"projector": 1e-3, "stage5": 2e-3}
    assert stage.data.casual_questions == 0.5
    assert len(caplog.messages) == 1


def test_old_and_a_new_key_together_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"stages\[0\]: trains is the old name of learning_rates; give only"):
        Recipe.load(write(tmp_path, changed("trains: {projector: 1e-3}")))


def test_overrides_reach_stages_by_name_and_by_number(tmp_path):
    texts = ["seed=7", "stages.a.steps=9", "stages.0.data.size=512", "stages.a.learning_rates.stage5=2e-3"]
    values = {"seed": 7, "stages.a.steps": 9, "stages.0.data.size": 512, "stages.a.learning_rates.stage5": 2e-3}
    for overrides in (texts, values):
        recipe = Recipe.load(write(tmp_path), overrides)
        assert (recipe.seed, recipe.stages[0].steps, recipe.stages[0].data.size) == (7, 9, 512)
        assert recipe.stages[0].learning_rates == {"projector": 1e-3, "stage5": 2e-3}
    assert Recipe.load(write(tmp_path), {"data_root": tmp_path}).data_root == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL.replace("steps", "stepps"), r"stages\[0\]: unknown key 'stepps'; did you mean steps\?"),
        (MINIMAL.replace("1e-3", ".nan"), "stage a: learning_rates.projector must be a finite number; got nan"),
        (MINIMAL.replace("1e-3", ".inf"), "stage a: learning_rates.projector must be a finite number; got inf"),
        (changed("weight_decay: .nan"), "stage a: weight_decay must be a finite number"),
        (changed("data: {min_brightness: .nan}"), "stage a: data.min_brightness must be a finite number"),
        (changed("data: {casual_questions: 1.5}"), "stage a: data.casual_questions must be between 0 and 1; got 1.5"),
        (changed("data: {captions: -1}"), "stage a: data.captions must be between 0 and 1; got -1"),
        (changed("data: {max_skipped: 2}"), "data.max_skipped must be between 0 and 1"),
        (changed("data: {max_tokens: 0}"), "data.max_tokens must be 1 or more; got 0"),
        (MINIMAL.replace("name: x", "name: 2024-13-01"), "not a readable YAML file: month must be in 1..12"),
        (MINIMAL + "sed: 3\n", "unknown key 'sed'; did you mean seed"),
        (MINIMAL + "frobnicate: 3\n", "known keys: name"),
        (MINIMAL.replace("steps: 3, ", ""), "give either steps or epochs"),
        (MINIMAL.replace("name: a, ", ""), r"stages\[0\]: missing key 'name'"),
        (MINIMAL.replace("steps: 3", "steps: many"), "steps must be a int; got 'many'"),
        (MINIMAL.replace("1e-3", "fast"), r"learning_rates.projector must be a float; got 'fast'"),
        (changed("schedule: sine"), "schedule must be one of cosine, linear, constant, stable"),
        (changed("batch_size: 3, gradient_accumulation_steps: 2"), "not a multiple of gradient_accumulation_steps"),
        ("name: x\nstages: []\n", "at least one stage"),
        (MINIMAL + MINIMAL.splitlines()[2] + "\n", "names must differ"),
        ("stages: [", "not a readable YAML"),
        ("just text", "expected a section with keys"),
    ],
)
def test_bad_recipes_are_rejected_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as rejection:
        Recipe.load(write(tmp_path, text))
    assert "\n" not in str(rejection.value)
    assert "recipe.yaml" in str(rejection.value) or "stage" in str(rejection.value)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seed_outside_the_range_of_generators_is_rejected(tmp_path, seed):
    with pytest.raises(ConfigError, match=f"seed must be 0 or more and below 2\\*\\*31; got {seed}"):
        Recipe.load(write(tmp_path), [f"seed={seed}"])


def test_only_the_limit_of_gradients_may_be_infinite(tmp_path):
    assert Recipe.load(write(tmp_path), ["stages.a.max_grad_norm=.inf"]).stages[0].max_grad_norm == math.inf
    for bad in ("stages.a.max_grad_norm=-.inf", "stages.a.max_grad_norm=.nan", "stages.a.weight_decay=.inf"):
        with pytest.raises(ConfigError, match="must be a finite number"):
            Recipe.load(write(tmp_path), [bad])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "write it as key=value"),
        ("stages.b.steps=1", "b is not one of a"),
        ("stages.5.steps=1", "5 is not one of a"),
        ("name.x.y=1", "name is not a section"),
        ("stages.a.lr=1", "unknown key 'lr'"),
        ("stages.²=1", "² is not one of a"),
        ("name=2026-02-30", "the value is not YAML"),
    ],
)
def test_bad_overrides_are_rejected(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.load(write(tmp_path), [override])


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no recipe at .*nowhere\.yaml"):
        Recipe.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_length_weighting": 1.5}, "answer_length_weighting must be between 0 and 1"),
        ({"answer_length_weighting": 0.5, "objective": "dense"}, "answer_length_weighting needs the objective chat"),
        ({"prompt_loss_weight": -0.5}, "prompt_loss_weight must be 0 or more"),
        ({"prompt_loss_weight": 0.5, "objective": "align"}, "prompt_loss_weight needs the objective chat"),
        ({"attention_supervision": 0.5, "objective": "align"}, "attention_supervision needs the objective chat"),
        ({"attention_supervision": 0.5, "data": Data(images=False)}, "attention_supervision needs images"),
        ({"attention_supervision": -1.0}, "attention_supervision must be 0 or more"),
        ({"calibrate": True, "objective": "dense"}, "calibrate needs the objective align or chat"),
        ({"layer_decays": {"language_model": 0.9}}, "language_model has no learning rate"),
    ],
)
def test_settings_without_effect_are_rejected(settings, message):
    with pytest.raises(ConfigError, match=message):
        Stage("one", 1, {"projector": 1e-3}, **settings)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("{path: a.json, weight: 0}", "weight must be above 0, and cannot be combined with repeat"),
        ("{path: a.json, weight: 1, repeat: 2}", "cannot be combined with repeat"),
        ("{path: a.json, weight: 1}, {path: b.json}", "source a.json: give all sources of a stage a weight, or none"),
        ("{path: []}", "a source needs a path"),
        ("{path: [1]}", r"path\[0\] must be a str"),
        ("{path: a.json, format: csv}", "format must be one of json, parquet, webdataset, datasets"),
    ],
)
def test_bad_sources_are_rejected(tmp_path, sources, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.load(write(tmp_path, changed(f"data: {{sources: [{sources}]}}")))


def test_source_may_have_a_list_of_paths(tmp_path):
    path = write(tmp_path, changed("data: {sources: [{path: [a.tar, b-*.tar], weight: 2}]}"))
    assert Recipe.load(path).stages[0].data.sources[0].paths == ["a.tar", "b-*.tar"]
