"""A step of training on pages of mixed shapes: at their own shapes and packed, beside padded squares and rows; and with
its products in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.suites import Row
from benchmarks.timing import Work, side_by_side
from convllava.checkpoints.inspection import language_models, towers
from convllava.data.collate import collate, lengths_of, pack
from convllava.data.synthetic_chat import ChatDataset
from convllava.model.builder import build_fresh
from convllava.synthetic import World, closed_vocabulary
from convllava.synthetic.world import SMALLEST

SAMPLES = 8
NATIVE = {"min_pixels": 64 * 64, "max_pixels": 2**26}
"""No page is resized, but for its sides to become multiples of the stride."""


def steps(names: Sequence[str], sides: Sequence[int], repeats: int, language: str) -> Iterator[Row]:
    """Forward and backward of tower, projector and language model on the same pages, ours and as is usual.

    Ours keeps every page as it is and lays the sequences end to end. The baseline pads every page to one square, the
    smallest in which none is shrunk, and every sequence to the longest. `side` is the root of the pages' area. A third
    step is ours under autocast in bfloat16, without what a stage's `precision: bfloat16` does besides.
    """
    for name in names:
        for side in sides:
            world = World("train", size=side, turns=6, simple=side < SMALLEST)
            sizes = [world.sample(index).image.size for index in range(SAMPLES)]
            square = -(-max(map(max, sizes)) // 64) * 64
            model, processor = model_of(name, language, {})
            model.train()
            ours = pack(items_of(name, language, world, NATIVE))
            squares = items_of(name, language, world, {"mode": "square", "side": square})
            padded = collate(squares, processor.tokenizer.pad_token_id)
            works = {"ours": step_of(model, ours), "padded": step_of(model, padded)}
            seconds = side_by_side({**works, "bfloat16": step_of(model, ours, low=True)}, repeats)
            yield {
                "tower": name,
                "side": side,
                "square": square,
                "seconds": round(seconds["ours"], 3),
                "padded_seconds": round(seconds["padded"], 3),
                "ratio": round(seconds["ours"] / seconds["padded"], 3),
                "bfloat16_ratio": round(seconds["bfloat16"] / seconds["ours"], 3),
                "pixels": pixels_of(ours),
                "padded_pixels": pixels_of(padded),
                "useful_tokens": round(sum(lengths_of(ours)) / ours["input_ids"].numel(), 3),
                "useful_tokens_padded": round(sum(lengths_of(padded)) / padded["input_ids"].numel(), 3),
            }


def model_of(name: str, language: str, pixels: dict[str, Any]) -> Any:
    vision = {key: getattr(towers()[name], key) for key in ("depths", "hidden_sizes")}
    return build_fresh(vision=vision, language=language_models()[language], pixels=pixels, words=closed_vocabulary())


def items_of(name: str, language: str, world: World, pixels: dict[str, Any]) -> list[dict[str, Any]]:
    """The world's first pages as sequences, for a processor with such pixels."""
    dataset = ChatDataset(world, model_of(name, language, pixels)[1], SAMPLES)
    return [dataset[index] for index in range(SAMPLES)]


def pixels_of(batch: dict[str, Any]) -> int:
    return sum(image.shape[1] * image.shape[2] for image in batch.get("pixel_values", ()))


def step_of(model: Any, batch: dict[str, Any], low: bool = False) -> Work:
    def run() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()

    return run
