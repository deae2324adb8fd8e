"""A step whose frozen stages are read from files beside one that runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.steps import NATIVE, items_of, model_of, step_of
from benchmarks.suites import Row
from benchmarks.timing import Work, side_by_side
from convllava.data.collate import pack
from convllava.synthetic import World
from convllava.synthetic.world import SMALLEST
from convllava.training.datasets import Collator
from convllava.training.frozen_features import FeatureStore, LookUp
from convllava.training.frozen_stages import FrozenStages, frozen_stages
from convllava.training.optim import freeze_all_but
from convllava.training.recipe import Stage

STAGES = {
    "projector": ("stage5", "projector"),
    "instruct": ("projector", "language_model"),
}
"""What trains in the paper's first and in its last stage."""
_PAGES = 4


def features(names: Sequence[str], sides: Sequence[int], repeats: int, language: str) -> Iterator[Row]:
    """Forward and backward on the same generated pages: all stages run, or the frozen ones' features read.

    Reading includes the name that is made of the pixels, which the loader's workers do in training.
    """
    for name in names:
        for side in sides:
            world = World("train", size=side, turns=6, simple=side < SMALLEST)
            items = items_of(name, language, world, NATIVE)[:_PAGES]
            model = model_of(name, language, {})[0].train()
            for stage, parts in STAGES.items():
                with tempfile.TemporaryDirectory() as folder:
                    row = _row(model, parts, items, Path(folder), repeats)
                    yield {"tower": name, "side": side, "stage": stage, **row}


def _row(model: Any, parts: Sequence[str], items: list[Any], folder: Path, repeats: int) -> Row:
    freeze_all_but(model, parts)
    tower, store = model.model.vision_tower, FeatureStore(folder, float("inf"))
    count = frozen_stages(Stage("bench", 1, dict.fromkeys(parts, 1e-3)), tower.config.num_stages)
    run = _step(model, items, FrozenStages(tower, count, tower.dtype), pack)
    kept = _step(model, items, FrozenStages(tower, count, tower.dtype, store), LookUp(pack, store))
    # The first call, which does not count, computes the features and keeps them.
    seconds = side_by_side({"run": run, "kept": kept}, repeats)
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    return {
        "frozen_stages": count,
        "run_seconds": round(seconds["run"], 3),
        "kept_seconds": round(seconds["kept"], 3),
        "ratio": round(seconds["kept"] / seconds["run"], 3),
        "mb_an_image": round(sum(sizes) / len(sizes) / 1e6, 2),
    }


def _step(model: Any, items: list[Any], frozen: FrozenStages, collate: Collator) -> Work:
    def run() -> None:
        step_of(model, frozen.encoded(collate(items)))()

    return run
