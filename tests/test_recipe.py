"""Recipes: YAML there and back, overrides, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convllava.errors import InputError
from convllava.training.recipe import Data, Recipe, Stage, dump_recipe, load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("**/*.yaml"))
MINIMAL = "name: x\nstages:\n  - {name: a, steps: 3, trains: {projector: 1e-3}}\n"


def write(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repo_survive_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


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
    assert load_recipe(write(tmp_path_factory.mktemp("recipe"), dump_recipe(recipe))) == recipe


def test_overrides_reach_stages_by_name_and_by_number(tmp_path):
    recipe = load_recipe(
        write(tmp_path), ["seed=7", "stages.a.steps=9", "stages.0.data.size=512", "stages.a.trains.stage5=2e-3"]
    )
    assert (recipe.seed, recipe.stages[0].steps, recipe.stages[0].data.size) == (7, 9, 512)
    assert recipe.stages[0].trains == {"projector": 1e-3, "stage5": 2e-3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL.replace("steps", "stepps"), r"stages\[0\]: unknown key 'stepps'; did you mean steps\?"),
        (MINIMAL.replace("1e-3", ".nan"), "stage a: trains.projector is a finite number; got nan"),
        (MINIMAL.replace("1e-3", ".inf"), "stage a: trains.projector is a finite number; got inf"),
        (MINIMAL.replace("steps: 3", "steps: 3, weight_decay: .nan"), "stage a: weight_decay is a finite number"),
        (MINIMAL.replace("steps: 3", "steps: 3, data: {darkest: .nan}"), "stage a: data.darkest is a finite number"),
        (
            MINIMAL.replace("steps: 3", "steps: 3, data: {casual: 1.5}"),
            "stage a: data.casual is a share from 0 to 1; got 1.5",
        ),
        (
            MINIMAL.replace("steps: 3", "steps: 3, data: {captions: -1}"),
            "stage a: data.captions is a share from 0 to 1; got -1",
        ),
        (MINIMAL.replace("steps: 3", "steps: 3, data: {max_skipped: 2}"), "data.max_skipped is a share from 0 to 1"),
        (MINIMAL.replace("steps: 3", "steps: 3, data: {max_tokens: 0}"), "data.max_tokens is 1 or more; got 0"),
        (MINIMAL.replace("name: x", "name: 2024-13-01"), "not a readable YAML file: month must be in 1..12"),
        (MINIMAL + "sed: 3\n", "unknown key 'sed'; did you mean seed"),
        (MINIMAL + "frobnicate: 3\n", "known keys: name"),
        (MINIMAL.replace("steps: 3, ", ""), "give either steps or epochs"),
        (MINIMAL.replace("steps: 3", "steps: many"), "steps must be a int; got 'many'"),
        (MINIMAL.replace("1e-3", "fast"), r"trains.projector must be a float; got 'fast'"),
        (
            MINIMAL.replace("steps: 3", "steps: 3, schedule: sine"),
            "schedule must be one of cosine, linear, constant, stable",
        ),
        (MINIMAL.replace("steps: 3", "steps: 3, batch_size: 3, accumulate: 2"), "no multiple of accumulate"),
        ("name: x\nstages: []\n", "at least one stage"),
        (MINIMAL + MINIMAL.splitlines()[2] + "\n", "names must differ"),
        ("stages: [", "not a readable YAML"),
        ("just text", "expected a section with keys"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as refusal:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(refusal.value)
    assert "recipe.yaml" in str(refusal.value) or "stage" in str(refusal.value)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path, seed):
    with pytest.raises(InputError, match=f"seed is 0 or more and below 2\\*\\*31; got {seed}"):
        load_recipe(write(tmp_path), [f"seed={seed}"])


def test_gradients_may_be_left_as_they_are(tmp_path):
    load_recipe(write(tmp_path), ["stages.a.max_grad_norm=.inf"])


@pytest.mark.parametrize(
    "override",
    ["steps", "stages.b.steps=1", "stages.5.steps=1", "name.x.y=1", "stages.a.lr=1", "stages.²=1", "name=2026-02-30"],
)
def test_bad_overrides_are_refused(tmp_path, override):
    with pytest.raises(InputError):
        load_recipe(write(tmp_path), [override])


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no recipe at .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": 1.5}, "balance lies between 0"),
        ({"balance": 0.5, "objective": "dense"}, "balance is for the objective chat"),
        ({"questions": -0.5}, "questions is a weight of 0 or more"),
        ({"questions": 0.5, "objective": "align"}, "questions is a weight of 0 or more"),
        ({"guidance": 0.5, "objective": "align"}, "guidance is a weight of 0 or more"),
        ({"guidance": -1.0}, "guidance is a weight of 0 or more"),
        ({"calibrate": True, "objective": "dense"}, "calibrate is for the objectives align and chat"),
    ],
)
def test_settings_that_would_have_no_meaning_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Stage("one", 1, {"projector": 1e-3}, **settings)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("{path: a.json, weight: 0}", "weight must be above 0, and stands in place of repeat"),
        ("{path: a.json, weight: 1, repeat: 2}", "stands in place of repeat"),
        ("{path: a.json, weight: 1}, {path: b.json}", "source a.json: weight is for all sources"),
        ("{path: []}", "a source needs a path"),
        ("{path: [1]}", r"path\[0\] must be a str"),
        ("{path: a.json, format: csv}", "format must be one of json, parquet, webdataset, datasets"),
    ],
)
def test_a_source_of_a_recipe_is_checked_as_it_is_read(tmp_path, sources, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, with_sources(sources)))


def with_sources(sources: str) -> str:
    return MINIMAL.replace("steps: 3", f"steps: 3, data: {{sources: [{sources}]}}")


def test_paths_of_a_recipe_may_be_a_list(tmp_path):
    path = write(tmp_path, with_sources("{path: [a.tar, b-*.tar], weight: 2}"))
    assert load_recipe(path).stages[0].data.sources[0].paths == ["a.tar", "b-*.tar"]
