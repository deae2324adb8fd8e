"""Time to the first token: visual encoder and prefill of the language model, for ours and other encoders."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoModel, LlamaConfig

from benchmarks.encoders import clip, fast_vit_hd, llava_15, llava_next, ours, qwen
from benchmarks.measure import Progress, Row, Settings, Work, live_memory, measure_once, side_by_side
from convllava.checkpoints.inspection import TEXT_TOKENS
from convllava.io import ResumableJsonl
from convllava.model.costs import prefill_flops
from convllava.model.presets import language_models


def first_token(settings: Settings, journal: ResumableJsonl, progress: Progress) -> list[Row]:
    """Measure CPU seconds to the first token of each encoder, with `TEXT_TOKENS` tokens of text after the image.

    All encoders take turns, so the journal stores single times and not rows.
    """
    sides = settings.sides
    encoders = [encoder for name in settings.towers for encoder in ours(name, sides)]
    if settings.peers:
        encoders += [llava_15(), llava_next(), clip("ViT-L/14 at 672", 672), *(qwen(side) for side in sides[:1])]
        encoders += [fast_vit_hd(side) for side in sides]
    config = LlamaConfig(**language_models()[settings.language])
    decoder = AutoModel.from_config(config).eval()
    others = {name: LlamaConfig(**language_models()[name]) for name in ("0.5b", "7b")}

    def prefill(tokens: int) -> Work:
        prompt = torch.randn(1, tokens, config.hidden_size)

        def work() -> Any:
            with torch.no_grad():
                return decoder(inputs_embeds=prompt, use_cache=False)

        return work

    works: dict[str, Work] = {}
    for encoder in encoders:
        works[encoder.name] = encoder.run
        works[f"{encoder.name} prefill"] = prefill(encoder.tokens + TEXT_TOKENS)
    seconds = side_by_side(works, settings.repeats, journal, progress)
    rows = []
    for encoder in encoders:
        prompt = encoder.tokens + TEXT_TOKENS
        live = measure_once(journal, f"memory {encoder.name}", partial(live_memory, encoder.run))
        row = {
            "encoder": encoder.name,
            "parameters": encoder.parameters,
            "visual_tokens": encoder.tokens,
            "encoder_gflop": round(encoder.gflop, 1),
            "prefill_gflop": round(prefill_flops(config, prompt) / 1e9, 1),
            "encoder_seconds": round(seconds[encoder.name], 3),
            "prefill_seconds": round(seconds[f"{encoder.name} prefill"], 3),
            "first_token_seconds": round(seconds[encoder.name] + seconds[f"{encoder.name} prefill"], 3),
            "encoder_live_mb": round(live, 1),
        }
        for name, other in others.items():
            row[f"with_{name}_gflop"] = round(encoder.gflop + prefill_flops(other, prompt) / 1e9, 1)
        rows.append(row)
    return rows
