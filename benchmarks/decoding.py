"""Cost of one decoding step: the engine compared with `generate`, a plain loop, and reading the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks.measure import Row, Settings, Work, side_by_side
from convllava.inference.ragged_attention import Span
from convllava.inference.ragged_model import RaggedModel, store_by_columns
from convllava.model.presets import language_models

PROMPT, TOKENS = 16, 16
"""Tokens of the prompt and of the answer."""
BATCHES = (1, 2, 4, 8)


def decoding(settings: Settings) -> list[Row]:
    """Measure milliseconds of a step that writes one token of each text, and compare with reading all weights once.

    All of them write the same tokens after the same prompt. `generate` also reads the prompt of a few tokens. `rows`
    and `columns` are the engine with its weights stored by rows and by columns.
    """
    config = LlamaConfig(**language_models()[settings.language])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = torch.randint(0, config.vocab_size, (max(BATCHES), PROMPT))
    by_columns = AutoModelForCausalLM.from_config(config).eval()
    by_columns.load_state_dict(model.state_dict())
    store_by_columns(by_columns)
    works: dict[tuple[str, int], Work] = {
        ("generate", 1): _generate(model, prompts[:1]),
        ("loop", 1): _loop(model, prompts[:1]),
        **{("rows", texts): _engine(model, prompts[:texts]) for texts in BATCHES},
        **{("columns", texts): _engine(by_columns, prompts[:texts]) for texts in BATCHES},
    }
    first_answers = [work()[0] for work in works.values()]
    # A step must read at least each weight once (a tied head is the embedding). A matrix-vector product reads memory as
    # fast as possible.
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    matrix, vector = torch.zeros(weights // 512, 512), torch.randn(512)
    seconds = side_by_side({("floor", 1): lambda: matrix @ vector} | works, settings.repeats)
    floor = seconds.pop(("floor", 1))
    return [
        {
            "way": way,
            "texts": texts,
            "ms_per_step": round(1e3 * taken / TOKENS, 1),
            "ms_per_token": round(1e3 * taken / TOKENS / texts, 1),
            "step_over_floor": round(taken / TOKENS / floor, 2),
            "same_tokens": all(tokens == first_answers[0] for tokens in first_answers),
        }
        for (way, texts), taken in seconds.items()
    ]


def _generate(model: Any, prompts: Tensor) -> Work:
    @torch.inference_mode()
    def work() -> list[list[int]]:
        settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        return model.generate(prompts, **settings)[:, PROMPT:].tolist()

    return work


def _loop(model: Any, prompts: Tensor) -> Work:
    @torch.inference_mode()
    def work() -> list[list[int]]:
        cache, picked = DynamicCache(config=model.config), []
        tokens = prompts
        for _ in range(TOKENS):
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            tokens = logits.argmax(-1, keepdim=True)
            picked.append(tokens)
        return torch.cat(picked, dim=1).tolist()

    return work


def _engine(model: Any, prompts: Tensor) -> Work:
    ragged = RaggedModel(model.base_model, model.get_output_embeddings(), len(prompts), PROMPT + TOKENS)

    def spans(start: int, count: int) -> list[Span]:
        return [Span(slot, start, count) for slot in range(len(prompts))]

    @torch.inference_mode()
    def work() -> list[list[int]]:
        picked = [ragged.forward(spans(0, PROMPT), ragged.embed(prompts.flatten())).argmax(-1)]
        for step in range(TOKENS - 1):
            picked.append(ragged.forward(spans(PROMPT + step, 1), ragged.embed(picked[-1])).argmax(-1))
        return torch.stack(picked, dim=1).tolist()

    return work
