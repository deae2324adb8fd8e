"""Visual encoders with random weights at their published shapes, to measure their cost: ours and other models'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from benchmarks import fastvithd
from benchmarks.fastvithd import FastVitHD
from benchmarks.measure import Work
from convllava.geometry import Size, visual_tokens
from convllava.model.config import ConvLlavaVisionConfig
from convllava.model.costs import tower_flops
from convllava.model.presets import towers
from convllava.model.vision_tower import ConvLlavaVisionModel


@dataclass(frozen=True)
class Encoder:
    """One visual encoder at one image size.

    Attributes:
        name: Name with the resolution.
        tokens: Visual tokens that reach the language model.
        parameters: Number of parameters of the encoder.
        gflop: Operations of one image.
        run: Encodes random pixels once.
    """

    name: str
    tokens: int
    parameters: int
    gflop: float
    run: Callable[[], Any]


def encode(model: Any, image: Tensor | list[Tensor], **settings: Any) -> Work:
    """Return a function that encodes images without gradients by our tower or by transformers' ConvNeXt."""

    def work() -> Tensor:
        with torch.no_grad():
            if isinstance(model, ConvLlavaVisionModel):
                return model(image, **settings).last_hidden_state
            return model.encoder(model.embeddings(image)).last_hidden_state.permute(0, 2, 3, 1).flatten(0, 2)

    return work


def ours(name: str, sides: Sequence[int]) -> Iterator[Encoder]:
    """Yield one of our towers at several sizes."""
    config = towers()[name]
    model = ConvLlavaVisionModel(config).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for side in sides:
        size, pixels = Size(side, side), torch.randn(1, 3, side, side)
        tokens, gflop = visual_tokens(size, config.stride, False), tower_flops(config, size) / 1e9
        yield Encoder(f"ConvLLaVA {name} at {side}", tokens, parameters, gflop, encode(model, pixels))


def stock_convnext(config: ConvLlavaVisionConfig) -> ConvNextModel:
    """Return transformers' own ConvNeXt of the same shape, with random weights."""
    shape: dict[str, Any] = {"depths": config.depths, "hidden_sizes": config.hidden_sizes}
    return ConvNextModel(ConvNextConfig(**shape, num_stages=config.num_stages, patch_size=config.patch_size)).eval()


def clip(name: str, side: int, crops: int = 1) -> Encoder:
    """Return CLIP ViT-L/14 without its last layer, as LLaVA uses it. All patches reach the language model."""
    tokens = crops * (side // 14) ** 2
    return _encoder(name, tokens, partial(_clip_vit, side), lambda model, pixels: model(pixels), (crops, 3, side, side))


def llava_15() -> Encoder:
    """Return LLaVA-1.5's encoder: CLIP ViT-L/14 at 336, 576 tokens."""
    return clip("LLaVA-1.5 ViT-L/14 at 336", 336)


def llava_next() -> Encoder:
    """Return LLaVA-NeXT's encoder at 672: the whole image and four crops through CLIP ViT-L/14 at 336, 2880 tokens."""
    return clip("LLaVA-NeXT ViT-L/14, 5 crops at 672", 336, crops=5)


@cache  # more than a gigabyte each
def _clip_vit(side: int) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        patch_size=14,
        image_size=side,
    )
    return CLIPVisionModel(config).eval()


def qwen(side: int) -> Encoder:
    """Return Qwen2.5-VL's encoder: patches of 14, windows of 112, four patches merged into one token."""
    cells = side // 28 * 2
    grid = torch.tensor([[1, cells, cells]])
    config = Qwen2_5_VLVisionConfig(hidden_size=1280, out_hidden_size=3584)  # the defaults of the class differ
    return _encoder(
        f"Qwen2.5-VL ViT at {cells * 14}",
        cells * cells // 4,
        lambda: Qwen2_5_VisionTransformerPretrainedModel._from_config(config).eval(),
        lambda model, pixels: model(pixels, grid_thw=grid),
        (cells * cells, 3 * 2 * 14 * 14),
    )


def fast_vit_hd(side: int) -> Encoder:
    """Return FastVLM's encoder, FastViTHD, reparameterised."""
    tokens = (side // fastvithd.STRIDE) ** 2
    return _encoder(
        f"FastViTHD at {side}", tokens, _fast_vit_hd, lambda model, pixels: model(pixels), (1, 3, side, side)
    )


@cache
def _fast_vit_hd() -> FastVitHD:
    return FastVitHD().eval()


def _encoder(
    name: str, tokens: int, build: Callable[[], Any], run: Callable[[Any, Tensor], Any], shape: tuple[int, ...]
) -> Encoder:
    model = build()
    pixels = torch.randn(shape)

    def work() -> Any:
        with torch.no_grad():
            return run(model, pixels)

    # Attention as plain products: torch does not count its fused kernels on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Encoder(name, tokens, parameters, counter.get_total_flops() / 1e9, work)
