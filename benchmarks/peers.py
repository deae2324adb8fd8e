"""Visual encoders of other models with random weights at their published shapes: what they cost, not what they know."""

from __future__ import annotations

from collections.abc import Callable
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

from benchmarks import fastvit
from benchmarks.fastvit import FastVitHD
from convllava.model.config import ConvLlavaVisionConfig


@dataclass(frozen=True)
class Encoder:
    """One visual encoder on one size of image.

    Attributes:
        name: With its resolution.
        tokens: Visual tokens that reach the language model.
        parameters: Of the encoder.
        gflop: Of one image.
        run: Encodes random pixels once.
    """

    name: str
    tokens: int
    parameters: int
    gflop: float
    run: Callable[[], Any]


def stock(config: ConvLlavaVisionConfig) -> ConvNextModel:
    """transformers' own ConvNeXt of the same shape, without weights of ours."""
    shape: dict[str, Any] = {"depths": config.depths, "hidden_sizes": config.hidden_sizes}
    return ConvNextModel(ConvNextConfig(**shape, num_stages=config.num_stages, patch_size=config.patch_size)).eval()


def llava_15() -> Encoder:
    """LLaVA-1.5: CLIP ViT-L/14 at 336, all patches to the language model."""
    return clip("LLaVA-1.5 ViT-L/14", 336, crops=1)


def llava_next() -> Encoder:
    """LLaVA-NeXT at 672: the image whole and in four crops through CLIP ViT-L/14 at 336 (2880 tokens)."""
    return clip("LLaVA-NeXT ViT-L/14, 5 crops", 336, crops=5)


def clip(name: str, side: int, crops: int) -> Encoder:
    """CLIP ViT-L/14 at a resolution, all patches to the language model, its last layer left out as LLaVA does."""
    shape = (crops, 3, side, side)
    tokens = crops * (side // 14) ** 2
    title = f"{name} at {side}" if crops == 1 else f"{name} at 672"
    return _encoder(title, tokens, partial(_vit, side), lambda model, pixels: model(pixels), shape)


@cache
def _vit(side: int) -> CLIPVisionModel:
    """One for all that use it, since each takes more than a gigabyte."""
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
    """Qwen2.5-VL's encoder: patches of 14, windows of 112, four patches merged into one token."""
    cells = side // 28 * 2
    shape = (cells * cells, 3 * 2 * 14 * 14)
    grid = torch.tensor([[1, cells, cells]])
    config = Qwen2_5_VLVisionConfig(hidden_size=1280, out_hidden_size=3584)  # the class's own width is another

    def build() -> Any:
        return Qwen2_5_VisionTransformerPretrainedModel._from_config(config).eval()

    def run(model: Any, pixels: Tensor) -> Any:
        return model(pixels, grid_thw=grid)

    return _encoder(f"Qwen2.5-VL ViT at {cells * 14}", cells * cells // 4, build, run, shape)


def fast_vit_hd(side: int) -> Encoder:
    """FastVLM's FastViTHD, reparameterised."""
    tokens = (side // fastvit.STRIDE) ** 2
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

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Encoder(name, tokens, parameters, _gflop(work), work)


def _gflop(work: Callable[[], Any]) -> float:
    """Of one call, with attention as plain products, since torch does not count its fused kernels on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9
