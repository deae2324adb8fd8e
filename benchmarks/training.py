"""Speed of training steps: the tower alone, packed sequences, filled micro-batches, cached frozen stages."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.encoders import stock_convnext
from benchmarks.measure import Row, Settings, Work, side_by_side
from convllava import checkpoints
from convllava.data.batching import MicroBatchBudget, MicroBatchPlan
from convllava.data.collate import collate, lengths_of, pack
from convllava.data.formats import Records
from convllava.data.mixture import Mixture, MixtureSource
from convllava.data.synthetic_chat import ChatDataset
from convllava.model.builder import build_fresh
from convllava.model.presets import language_models, towers
from convllava.model.vision_tower import ConvLlavaVisionModel
from convllava.synthetic import World, closed_vocabulary
from convllava.synthetic.world import SMALLEST
from convllava.training.datasets import Collator
from convllava.training.frozen_features import CachedFeatureCollator, FeatureStore, FrozenStages, count_frozen_stages
from convllava.training.optim import train_only
from convllava.training.recipe import Stage

NATIVE_PIXELS = {"min_pixels": 64 * 64, "max_pixels": 2**26}
"""Image settings that resize no page, except to make its sides multiples of the stride."""
PACKED_SAMPLES = 8
BATCHED_SAMPLES, FIXED_BATCH = 128, 8
TEXT_ONLY_SHARE = 0.25
"""Share of samples without an image in the suite `batching`."""
CACHED_SAMPLES = 4
CACHED_STAGES = {"projector": ("stage5", "projector"), "instruct": ("projector", "language_model")}
"""The parts that the paper's first and last stage train."""


def training(name: str, side: int, settings: Settings) -> list[Row]:
    """Compare forward and backward of our tower with transformers' ConvNeXt."""
    config, image = towers()[name], torch.randn(1, 3, side, side)

    def step(model: Any) -> Work:
        def work() -> None:
            model.zero_grad()
            with torch.enable_grad():
                if isinstance(model, ConvLlavaVisionModel):
                    features = model(image).last_hidden_state
                else:
                    features = model.encoder(model.embeddings(image)).last_hidden_state
                features.square().mean().backward()

        return work

    works = {"ours": step(ConvLlavaVisionModel(config).train()), "stock": step(stock_convnext(config).train())}
    seconds = side_by_side(works, settings.repeats)
    speedup = round(seconds["stock"] / seconds["ours"], 3)
    return [{"tower": name, "side": side, "seconds": round(seconds["ours"], 3), "speedup": speedup}]


def packing(name: str, side: int, settings: Settings) -> list[Row]:
    """Compare training steps of tower, projector and language model on the same pages of mixed shapes.

    Ours keeps the shape of each page and packs the sequences. The baseline pads all pages to one square, the smallest
    that shrinks none, and all sequences to the longest. The third step is ours under bfloat16 autocast, without the
    other changes that `precision: bfloat16` makes in a recipe. `side` is the square root of a page's area.
    """
    world = World("train", size=side, turns=6, simple=side < SMALLEST)
    sizes = [world.sample(index).image.size for index in range(PACKED_SAMPLES)]
    square = -(-max(map(max, sizes)) // 64) * 64
    model, processor = _fresh_model(name, settings.language, {})
    model.train()
    ours = pack(_encoded_pages(name, settings.language, world, NATIVE_PIXELS))
    squares = _encoded_pages(name, settings.language, world, {"mode": "square", "side": square})
    padded = collate(squares, processor.tokenizer.pad_token_id)
    works = {"ours": _step(model, ours), "padded": _step(model, padded), "bfloat16": _step(model, ours, bfloat16=True)}
    seconds = side_by_side(works, settings.repeats)
    return [
        {
            "tower": name,
            "side": side,
            "square": square,
            "seconds": round(seconds["ours"], 3),
            "padded_seconds": round(seconds["padded"], 3),
            "ratio": round(seconds["ours"] / seconds["padded"], 3),
            "bfloat16_ratio": round(seconds["bfloat16"] / seconds["ours"], 3),
            "pixels": _pixels(ours),
            "padded_pixels": _pixels(padded),
            "useful_tokens": round(sum(lengths_of(ours)) / ours["input_ids"].numel(), 3),
            "useful_tokens_padded": round(sum(lengths_of(padded)) / padded["input_ids"].numel(), 3),
        }
    ]


def batching(side: int, settings: Settings) -> list[Row]:
    """Compare padded micro-batches of eight samples with micro-batches that are filled up to a budget.

    The bundled model trains on generated pages and on text alone. The budget is the positions and the pixels of the
    largest fixed micro-batch: memory must be large enough for that one in any case. `side` is the square root of a
    page's area.
    """
    model, processor = checkpoints.read(checkpoints.find("tiny"))
    model.train()
    processor.image_processor.change(**NATIVE_PIXELS)
    samples = mixed_samples(World("train", size=side, simple=side < SMALLEST), processor)
    fixed = [samples[first : first + FIXED_BATCH] for first in range(0, BATCHED_SAMPLES, FIXED_BATCH)]
    pad = processor.tokenizer.pad_token_id
    fixed_batches = [collate(chosen, pad) for chosen in fixed]
    filled_batches = [collate(chosen, pad) for chosen in filled_to_budget(samples, fixed_batches)]
    seconds = side_by_side(
        {"fixed": _epoch(model, fixed_batches), "filled": _epoch(model, filled_batches)}, settings.repeats
    )
    return [
        {
            "side": side,
            "samples": BATCHED_SAMPLES,
            **{f"fixed_{key}": value for key, value in fill_of(fixed_batches).items()},
            **{f"budget_{key}": value for key, value in fill_of(filled_batches).items()},
            "fixed_seconds": round(seconds["fixed"], 2),
            "budget_seconds": round(seconds["filled"], 2),
            "ratio": round(seconds["filled"] / seconds["fixed"], 3),
        }
    ]


class _Numbers(Records):
    """Records for the mixture, one number for each sample."""

    name = "samples"

    def __len__(self) -> int:
        return BATCHED_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index}


def mixed_samples(world: World, processor: Any) -> list[dict[str, Any]]:
    """Return encoded samples, a share of them without their image."""
    kinds = [ChatDataset(world, processor, BATCHED_SAMPLES, images=images) for images in (False, True)]
    draw = random.Random(0)
    return [kinds[draw.random() > TEXT_ONLY_SHARE][index] for index in range(BATCHED_SAMPLES)]


def filled_to_budget(samples: list[dict[str, Any]], fixed: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the samples in micro-batches that are no larger than the largest fixed one."""
    areas = [int(one["image_sizes"].prod(-1).sum()) if "image_sizes" in one else 0 for one in samples]
    costs = np.array([(len(one["input_ids"]), area) for one, area in zip(samples, areas, strict=True)])
    positions = max(batch["input_ids"].numel() for batch in fixed)
    limits = MicroBatchBudget(1, BATCHED_SAMPLES, positions, max(map(_pixels, fixed)))
    mixture = Mixture([MixtureSource(_Numbers())])
    passes = MicroBatchPlan(mixture, [costs], limits)
    chosen = passes.first(passes.steps_of(BATCHED_SAMPLES))
    return [[samples[mixture[place][1]] for place in places] for places in chosen]


def fill_of(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of micro-batches, the share of positions that are not padding, and how full they are."""
    positions = [batch["input_ids"].numel() for batch in batches]
    return {
        "micro_batches": len(batches),
        "useful_tokens": round(sum(sum(lengths_of(batch)) for batch in batches) / sum(positions), 3),
        "fullest": max(positions),
        "fullness": round(sum(positions) / len(positions) / max(positions), 3),
    }


def frozen_features(name: str, side: int, settings: Settings) -> list[Row]:
    """Compare steps that run the frozen stages of the tower with steps that read their features from a cache on disk.

    Reading includes the cache key, a digest of the pixels; in training the workers of the data loader compute it.
    """
    world = World("train", size=side, turns=6, simple=side < SMALLEST)
    samples = _encoded_pages(name, settings.language, world, NATIVE_PIXELS)[:CACHED_SAMPLES]
    model = _fresh_model(name, settings.language, {})[0].train()
    tower = model.model.vision_tower

    def step(frozen: FrozenStages, collator: Collator) -> Work:
        return lambda: _step(model, frozen.encode(collator(samples)))()

    rows = []
    for stage, parts in CACHED_STAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            train_only(model, parts)
            store = FeatureStore(Path(folder), float("inf"))
            count = count_frozen_stages(Stage("bench", 1, dict.fromkeys(parts, 1e-3)), tower.config.num_stages)
            works = {
                "run": step(FrozenStages(tower, count, tower.dtype), pack),
                # The warm-up call computes the features and stores them.
                "cached": step(FrozenStages(tower, count, tower.dtype, store), CachedFeatureCollator(pack, store)),
            }
            seconds = side_by_side(works, settings.repeats)
            file_sizes = [path.stat().st_size for path in Path(folder).rglob("*.safetensors")]
        rows.append(
            {
                "tower": name,
                "side": side,
                "stage": stage,
                "frozen_stages": count,
                "run_seconds": round(seconds["run"], 3),
                "cached_seconds": round(seconds["cached"], 3),
                "ratio": round(seconds["cached"] / seconds["run"], 3),
                "mb_per_image": round(sum(file_sizes) / len(file_sizes) / 1e6, 2),
            }
        )
    return rows


def _fresh_model(name: str, language: str, pixels: dict[str, Any]) -> Any:
    vision = {key: getattr(towers()[name], key) for key in ("depths", "hidden_sizes")}
    return build_fresh(vision=vision, language=language_models()[language], pixels=pixels, words=closed_vocabulary())


def _encoded_pages(name: str, language: str, world: World, pixels: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the world's first pages as training samples, with these image settings."""
    dataset = ChatDataset(world, _fresh_model(name, language, pixels)[1], PACKED_SAMPLES)
    return [dataset[index] for index in range(PACKED_SAMPLES)]


def _pixels(batch: dict[str, Any]) -> int:
    return sum(image.shape[1] * image.shape[2] for image in batch.get("pixel_values", ()))


def _step(model: Any, batch: dict[str, Any], bfloat16: bool = False) -> Work:
    """Return a function that runs forward and backward on a batch."""

    def work() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()

    return work


def _epoch(model: Any, batches: Sequence[dict[str, Any]]) -> Work:
    steps = [_step(model, batch) for batch in batches]
    return lambda: [step() for step in steps]
