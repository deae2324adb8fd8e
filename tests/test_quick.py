"""A shortened recipes/tiny-quick.yaml trains a model with random weights until it recognises colours."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import convllava
from convllava.evaluation import evaluate
from convllava.synthetic import World
from convllava.training.recipe import Recipe
from convllava.training.train import train

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-quick.yaml"
STEPS = {"dense": 200, "projector": 80, "pretrain": 150}
SMALL = {"mode": "native", "min_pixels": 16384, "max_pixels": 65536}
"""Smaller pages than in the recipe; they are large enough for colours."""


def test_shortened_quick_recipe_learns_colours(tmp_path):
    recipe = Recipe.load(RECIPE)
    scenes = {"kinds": {"scene": 1.0}}
    stages = [
        dataclasses.replace(stage, steps=STEPS[stage.name], data=dataclasses.replace(stage.data, **scenes))
        for stage in recipe.stages
        if stage.name in STEPS
    ]
    short = dataclasses.replace(recipe, stages=stages, model=dataclasses.replace(recipe.model, pixels=SMALL))
    model = convllava.load(train(short, tmp_path))
    world = World("heldout", seed=1, size=192, simple=True, **scenes)
    score = evaluate(model, world=world, samples=60, timed=0)["tasks"]["colour"]
    spread = math.sqrt(sum(share * (1 - share) / score["n"] for share in (score["accuracy"], score["blind"])))
    assert score["accuracy"] > score["blind"] + 4 * spread, score
