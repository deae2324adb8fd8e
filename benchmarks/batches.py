"""Passes filled by a budget beside passes of a fixed number of samples: the same samples, within the same memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.steps import NATIVE, pixels_of, step_of
from benchmarks.suites import Row
from benchmarks.timing import side_by_side
from convllava import checkpoints
from convllava.data.batching import Limits, Passes
from convllava.data.collate import collate, lengths_of
from convllava.data.formats import Records
from convllava.data.mixture import Mixture, Part
from convllava.data.synthetic_chat import ChatDataset
from convllava.synthetic import World
from convllava.synthetic.world import SMALLEST

SAMPLES, TOGETHER = 128, 8
_TEXT_ALONE = 0.25
"""Share of samples without their image."""


def batches(sides: Sequence[int], repeats: int) -> Iterator[Row]:
    """Forward and backward of the shipped model on generated pages and text alone, in padded passes of eight samples
    and in padded passes of what a budget holds.

    The budget is the positions and the pixels of the fullest of the fixed passes, which is what memory must hold for
    them. `side` is the root of the pages' area.
    """
    model, processor = checkpoints.read(checkpoints.find("tiny"))
    model.train()
    processor.image_processor.change(**NATIVE)
    for side in sides:
        items = _items(World("train", size=side, simple=side < SMALLEST), processor)
        fixed = _collated([items[first : first + TOGETHER] for first in range(0, SAMPLES, TOGETHER)], processor)
        filled = _collated(_filled(items, fixed), processor)
        seconds = side_by_side({"fixed": _run(model, fixed), "filled": _run(model, filled)}, repeats)
        yield {
            "side": side,
            "samples": SAMPLES,
            **{f"fixed_{key}": value for key, value in _figures(fixed).items()},
            **{f"budget_{key}": value for key, value in _figures(filled).items()},
            "fixed_seconds": round(seconds["fixed"], 2),
            "budget_seconds": round(seconds["filled"], 2),
            "ratio": round(seconds["filled"] / seconds["fixed"], 3),
        }


class _Counted(Records):
    """As many records as there are items."""

    name = "items"

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index}


def _items(world: World, processor: Any) -> list[dict[str, Any]]:
    kinds = [ChatDataset(world, processor, SAMPLES, images=images) for images in (False, True)]
    draw = random.Random(0)
    return [kinds[draw.random() > _TEXT_ALONE][index] for index in range(SAMPLES)]


def _collated(passes: list[list[dict[str, Any]]], processor: Any) -> list[dict[str, Any]]:
    return [collate(chosen, processor.tokenizer.pad_token_id) for chosen in passes]


def _filled(items: list[dict[str, Any]], fixed: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The items in passes no larger than the fullest fixed one."""
    costs = np.array([(len(item["input_ids"]), _area(item)) for item in items])
    limits = Limits(1, SAMPLES, max(map(_positions, fixed)), max(map(pixels_of, fixed)))
    mixture = Mixture([Part(_Counted())])
    passes = Passes(mixture, [costs], limits)
    return [[items[mixture[place][1]] for place in chosen] for chosen in passes.first(passes.steps_of(SAMPLES))]


def _area(item: dict[str, Any]) -> int:
    return int(item["image_sizes"].prod(-1).sum()) if "image_sizes" in item else 0


def _positions(batch: dict[str, Any]) -> int:
    return batch["input_ids"].numel()


def _figures(batches: list[dict[str, Any]]) -> dict[str, Any]:
    positions = [_positions(batch) for batch in batches]
    return {
        "passes": len(batches),
        "useful_tokens": round(sum(sum(lengths_of(batch)) for batch in batches) / sum(positions), 3),
        "fullest": max(positions),
        "fullness": round(sum(positions) / len(positions) / max(positions), 3),
    }


def _run(model: Any, batches: list[dict[str, Any]]) -> Any:
    steps = [step_of(model, batch) for batch in batches]

    def run() -> None:
        for step in steps:
            step()

    return run
