"""What `python -m benchmarks` measures. Every suite returns rows of plain numbers for JSON, tables and plots."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, CLIPImageProcessorPil, LlamaConfig

from benchmarks.peers import Encoder, clip, fast_vit_hd, llava_15, llava_next, qwen, stock
from benchmarks.timing import Progress, Work, kept, live_memory, matrix_product, peak_memory, side_by_side
from convllava.checkpoints.inspection import TEXT_TOKENS, language_models, towers
from convllava.geometry import Size, visual_tokens
from convllava.io import ResumableJsonl
from convllava.model.costs import prefill_flops, tower_flops
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.vision_tower import ConvLlavaVisionModel

Row = dict[str, Any]
SMALL = towers()["tiny"]
"""A tower for sizes that would take a large one minutes."""


def tower(names: Sequence[str], sides: Sequence[int], repeats: int) -> Iterator[Row]:
    """Inference, ours against transformers' ConvNeXt with the same weights: time, memory, share of the GEMM rate."""
    product, gflop = matrix_product()
    for name in names:
        config = towers()[name]
        config.layer_scale_init_value = 0.1  # with 1e-6 the blocks would not show in the difference
        model, baseline = ConvLlavaVisionModel(config).eval(), stock(config)
        baseline.load_state_dict(model.state_dict(), strict=False)
        for side in sides:
            image = torch.randn(1, 3, side, side)
            works = {"gemm": product, "ours": _encoding(model, image), "stock": _encoding(baseline, image)}
            seconds = side_by_side(works, repeats)
            work = tower_flops(config, Size(side, side)) / 1e9
            yield {
                "tower": name,
                "side": side,
                "gflop": round(work, 1),
                "gemm_gflops": round(gflop / seconds["gemm"], 1),
                "seconds": round(seconds["ours"], 3),
                "stock_seconds": round(seconds["stock"], 3),
                "speedup": round(seconds["stock"] / seconds["ours"], 3),
                "share_of_gemm": round(work / seconds["ours"] / (gflop / seconds["gemm"]), 3),
                "difference": _difference(model, baseline, image),
                **_memory(works | {"banded": _encoding(model, image, band_rows=config.stride)}),
            }


def _memory(works: Mapping[str, Work]) -> Row:
    """MB at the highest point of each: live in torch's allocator, and resident in the process."""
    memory: Row = {}
    for name in ("ours", "banded", "stock"):
        memory |= {
            f"{name}_live_mb": round(live_memory(works[name]), 1),
            f"{name}_resident_mb": round(peak_memory(works[name]), 1),
        }
    return memory


def training(names: Sequence[str], sides: Sequence[int], repeats: int) -> Iterator[Row]:
    """Forward and backward, ours against transformers' ConvNeXt."""
    for name in names:
        config = towers()[name]
        model, baseline = ConvLlavaVisionModel(config).train(), stock(config).train()
        for side in sides:
            image = torch.randn(1, 3, side, side)
            seconds = side_by_side({"ours": _step(model, image), "stock": _step(baseline, image)}, repeats)
            ratio = round(seconds["stock"] / seconds["ours"], 3)
            yield {"tower": name, "side": side, "seconds": round(seconds["ours"], 3), "speedup": ratio}


def mixed(names: Sequence[str], sides: Sequence[int], repeats: int) -> Iterator[Row]:
    """Eight images of aspect ratios from 1:4 to 4:1 and one area: together, one by one, and padded to the largest."""
    for name in names:
        config = towers()[name]
        model = ConvLlavaVisionModel(config).eval()
        for side in sides:
            sizes = [_of_aspect(side, ratio, config.stride) for ratio in (1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 2, 2, 3, 4)]
            images = [torch.randn(3, *size) for size in sizes]
            largest = torch.zeros(len(images), 3, *(max(size[axis] for size in sizes) for axis in (0, 1)))
            works = {
                "together": _encoding(model, images),
                "singles": _one_by_one(model, images),
                "padded": _encoding(model, largest),
            }
            seconds = side_by_side(works, repeats)
            yield {
                "tower": name,
                "side": side,
                "together_over_singles": round(seconds["together"] / seconds["singles"], 3),
                "padded_over_singles": round(seconds["padded"] / seconds["singles"], 3),
            }


def scale(sizes: Sequence[Size], repeats: int) -> Iterator[Row]:
    """A small tower far past the paper's sizes, in bands: seconds and memory against pixels."""
    model = ConvLlavaVisionModel(SMALL).eval()
    _encoding(model, torch.randn(1, 3, 512, 512))()
    for size in sizes:
        rows = max(64, 2**20 // size.width // 64 * 64)
        work = _streaming(model, torch.randn(3, rows, size.width), size.height)
        seconds = side_by_side({"banded": work}, repeats)["banded"]
        yield {
            "height": size.height,
            "width": size.width,
            "visual_tokens": visual_tokens(size, SMALL.stride, False),
            "seconds": round(seconds, 3),
            "microseconds_per_pixel": round(1e6 * seconds / (size.height * size.width), 3),
            "mb": round(peak_memory(work), 1),
        }


def exponent(rows: Sequence[Row]) -> float:
    """Of the pixels in the seconds of square images: the slope of a straight line through both logarithms."""
    squares = [row for row in rows if row["height"] == row["width"]]
    pixels = np.log([row["height"] * row["width"] for row in squares])
    return round(float(np.polyfit(pixels, np.log([row["seconds"] for row in squares]), 1)[0]), 3)


def first_token(
    names: Sequence[str],
    sides: Sequence[int],
    repeats: int,
    language: str,
    peers: bool,
    journal: ResumableJsonl | None = None,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """CPU seconds to the first token: encoder and prefill of a language model with what comes out of it.

    All encoders take turns, so a run is kept by its single times (`journal`), and not by its rows.
    """
    journal = journal or ResumableJsonl(None, {})
    encoders = [encoder for name in names for encoder in _ours(name, sides)]
    if peers:
        encoders += [llava_15(), llava_next(), clip("ViT-L/14", 672, crops=1), *(qwen(side) for side in sides[:1])]
        encoders += [fast_vit_hd(side) for side in sides]
    config = LlamaConfig(**language_models()[language])
    decoder = AutoModel.from_config(config).eval()
    others = {name: LlamaConfig(**language_models()[name]) for name in ("0.5b", "7b")}
    works: dict[str, Work] = {}
    for encoder in encoders:
        works[encoder.name] = encoder.run
        works[f"{encoder.name} prefill"] = _prefill(decoder, encoder.tokens + TEXT_TOKENS)
    seconds = side_by_side(works, repeats, journal, progress)
    for encoder in encoders:
        prompt = encoder.tokens + TEXT_TOKENS
        yield {
            "encoder": encoder.name,
            "parameters": encoder.parameters,
            "visual_tokens": encoder.tokens,
            "encoder_gflop": round(encoder.gflop, 1),
            "prefill_gflop": round(prefill_flops(config, prompt) / 1e9, 1),
            "encoder_seconds": round(seconds[encoder.name], 3),
            "prefill_seconds": round(seconds[f"{encoder.name} prefill"], 3),
            "first_token_seconds": round(seconds[encoder.name] + seconds[f"{encoder.name} prefill"], 3),
            "encoder_live_mb": round(kept(journal, f"memory {encoder.name}", partial(live_memory, encoder.run)), 1),
            **{
                f"with_{name}_gflop": round(encoder.gflop + prefill_flops(other, prompt) / 1e9, 1)
                for name, other in others.items()
            },
        }


def pixels(sides: Sequence[int], repeats: int) -> Iterator[Row]:
    """A photograph of 12 megapixels as JPEG to the tower's pixels, against transformers' Pillow processor."""
    photograph = _photograph(4000, 3000)
    for side in sides:
        works = _pixel_works(photograph, side)
        seconds = side_by_side(works, repeats)
        found = {name: np.asarray(works[name]()) for name in ("ours", "stock")}
        yield {
            "side": side,
            **{f"{name}_milliseconds": round(1000 * value, 1) for name, value in seconds.items()},
            "ours_over_stock": round(seconds["ours"] / seconds["stock"], 3),
            "equal": bool(np.array_equal(found["ours"], found["stock"])),
        }


def _pixel_works(photograph: bytes, side: int) -> dict[str, Work]:
    ours: Any = ConvLlavaImageProcessorPil(mode="crop", side=side)
    theirs: Any = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def decode() -> Image.Image:
        return Image.open(io.BytesIO(photograph)).convert("RGB")

    return {
        "decode": decode,
        "ours": lambda: ours(photograph)["pixel_values"],
        "stock": lambda: theirs(decode(), return_tensors="np")["pixel_values"],
    }


def _encoding(model: Any, image: Tensor | list[Tensor], **settings: Any) -> Work:
    def work() -> Tensor:
        with torch.no_grad():
            if isinstance(model, ConvLlavaVisionModel):
                return model(image, **settings).last_hidden_state
            return model.encoder(model.embeddings(image)).last_hidden_state.permute(0, 2, 3, 1).flatten(0, 2)

    return work


def _one_by_one(model: Any, images: list[Tensor]) -> Work:
    works = [_encoding(model, [image]) for image in images]
    return lambda: [work() for work in works]


def _streaming(model: ConvLlavaVisionModel, band: Tensor, height: int) -> Work:
    return lambda: sum(len(part) for part in model.stream(_repeated(band, height), height))


def _step(model: Any, image: Tensor) -> Work:
    def work() -> None:
        model.zero_grad()
        with torch.enable_grad():
            if isinstance(model, ConvLlavaVisionModel):
                found = model(image).last_hidden_state
            else:
                found = model.encoder(model.embeddings(image)).last_hidden_state
            found.square().mean().backward()

    return work


def _difference(model: Any, baseline: Any, image: Tensor) -> float:
    return float((_encoding(model, image)() - _encoding(baseline, image)()).abs().max())


def _prefill(decoder: Any, tokens: int) -> Work:
    prompt = torch.randn(1, tokens, decoder.config.hidden_size)

    def work() -> Any:
        with torch.no_grad():
            return decoder(inputs_embeds=prompt, use_cache=False)

    return work


def _ours(name: str, sides: Sequence[int]) -> Iterator[Encoder]:
    """One tower at several sizes."""
    config = towers()[name]
    model = ConvLlavaVisionModel(config).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for side in sides:
        size = Size(side, side)
        yield Encoder(
            f"ConvLLaVA {name} at {side}",
            visual_tokens(size, config.stride, False),
            parameters,
            tower_flops(config, size) / 1e9,
            _encoding(model, torch.randn(1, 3, side, side)),
        )


def _of_aspect(side: int, ratio: float, stride: int) -> tuple[int, int]:
    height = max(1, round(side * math.sqrt(ratio) / stride)) * stride
    return height, max(1, round(side**2 / height / stride)) * stride


def _repeated(band: Tensor, height: int) -> Iterator[Tensor]:
    """Bands of one image of so many rows, all of them views of one."""
    for top in range(0, height, band.shape[1]):
        yield band[:, : min(band.shape[1], height - top)]


def _photograph(width: int, height: int) -> bytes:
    """Something with the detail of a photograph: noise at several scales, as JPEG of quality 90."""
    generator = np.random.default_rng(0)
    layers = [
        np.asarray(Image.fromarray(generator.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((width, height)))
        for n in (8, 64, 512)
    ]
    image = Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
