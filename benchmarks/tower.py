"""Speed and memory of the vision tower without gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoders import encode, stock_convnext
from benchmarks.measure import Row, Settings, live_memory, matrix_product, peak_memory, side_by_side
from convllava.geometry import Size, visual_tokens
from convllava.model.costs import tower_flops
from convllava.model.presets import towers
from convllava.model.vision_tower import ConvLlavaVisionModel

SMALL = towers()["tiny"]
"""The tower for sizes that would take a large one minutes."""
SCALE = (Size(512, 512), Size(1024, 1024), Size(2048, 2048), Size(4096, 4096), Size(8192, 8192), Size(16384, 4096))
"""Sizes of the suite `scale`, (height, width)."""


def tower(name: str, side: int, settings: Settings) -> list[Row]:
    """Compare our tower with transformers' ConvNeXt with the same weights: time, memory, share of the GEMM rate."""
    config = towers()[name]
    config.layer_scale_init_value = 0.1  # with 1e-6 the blocks would have no effect on `difference`
    model, baseline = ConvLlavaVisionModel(config).eval(), stock_convnext(config)
    baseline.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(1, 3, side, side)
    product, product_gflop = matrix_product()
    works = {"ours": encode(model, image), "stock": encode(baseline, image)}
    seconds = side_by_side({"gemm": product, **works}, settings.repeats)
    gflop, rate = tower_flops(config, Size(side, side)) / 1e9, product_gflop / seconds["gemm"]
    memory: Row = {}
    for way, work in {**works, "banded": encode(model, image, band_rows=config.stride)}.items():
        memory[f"{way}_live_mb"] = round(live_memory(work), 1)
        memory[f"{way}_resident_mb"] = round(peak_memory(work), 1)
    row = {
        "tower": name,
        "side": side,
        "gflop": round(gflop, 1),
        "gemm_gflops": round(rate, 1),
        "seconds": round(seconds["ours"], 3),
        "stock_seconds": round(seconds["stock"], 3),
        "speedup": round(seconds["stock"] / seconds["ours"], 3),
        "share_of_gemm": round(gflop / seconds["ours"] / rate, 3),
        "difference": float((works["ours"]() - works["stock"]()).abs().max()),
    }
    return [row | memory]


def mixed_shapes(name: str, side: int, settings: Settings) -> list[Row]:
    """Encode eight images of one area, from 1:4 to 4:1: together, one by one, and padded to the largest."""
    config = towers()[name]
    model = ConvLlavaVisionModel(config).eval()
    images = []
    for ratio in (1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 2, 2, 3, 4):
        height = max(1, round(side * math.sqrt(ratio) / config.stride)) * config.stride
        width = max(1, round(side**2 / height / config.stride)) * config.stride
        images.append(torch.randn(3, height, width))
    padded = torch.zeros(len(images), 3, *(max(image.shape[axis] for image in images) for axis in (1, 2)))
    singles = [encode(model, [image]) for image in images]
    works = {
        "together": encode(model, images),
        "singles": lambda: [work() for work in singles],
        "padded": encode(model, padded),
    }
    seconds = side_by_side(works, settings.repeats)
    return [
        {
            "tower": name,
            "side": side,
            "together_over_singles": round(seconds["together"] / seconds["singles"], 3),
            "padded_over_singles": round(seconds["padded"] / seconds["singles"], 3),
        }
    ]


def scale(size: Size, settings: Settings) -> list[Row]:
    """Encode one image, far larger than the paper's, in bands with a small tower: seconds and memory."""
    model = ConvLlavaVisionModel(SMALL).eval()
    encode(model, torch.randn(1, 3, 512, 512))()
    band = torch.randn(3, max(64, 2**20 // size.width // 64 * 64), size.width)

    def bands() -> Iterator[Tensor]:  # views of one band, so that the image itself needs no memory
        for top in range(0, size.height, band.shape[1]):
            yield band[:, : size.height - top]

    def work() -> Any:
        return sum(len(part) for part in model.stream(bands(), size.height))

    seconds = side_by_side({"banded": work}, settings.repeats)["banded"]
    return [
        {
            "height": size.height,
            "width": size.width,
            "visual_tokens": visual_tokens(size, SMALL.stride, False),
            "seconds": round(seconds, 3),
            "microseconds_per_pixel": round(1e6 * seconds / (size.height * size.width), 3),
            "mb": round(peak_memory(work), 1),
        }
    ]


def exponent(rows: Sequence[Row]) -> float:
    """Return p in seconds ~ pixels^p over square images: the slope of a line through both logarithms."""
    squares = [row for row in rows if row["height"] == row["width"]]
    pixels = np.log([row["height"] * row["width"] for row in squares])
    return round(float(np.polyfit(pixels, np.log([row["seconds"] for row in squares]), 1)[0]), 3)
