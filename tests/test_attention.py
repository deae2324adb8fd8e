"""Attention guidance: the shares that are recorded are those of the attention, and pointing teaches to look."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig

from convllava.data.collate import GUIDES, collate
from convllava.data.synthetic_chat import ChatDataset
from convllava.errors import InputError
from convllava.model.builder import build_fresh
from convllava.synthetic import World, closed_vocabulary
from convllava.training.objectives import attention_supervision
from convllava.training.objectives.attention_supervision import (
    Guidance,
    check_attention,
    guide_attention,
    guided_layers,
)
from convllava.training.objectives.losses import answer_weights
from convllava.training.recipe import Stage


def parts(layers: int = 2):
    language = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    return build_fresh(
        vision={"depths": [1] * 5, "hidden_sizes": [8, 8, 8, 8, 16], "layer_scale_init_value": 0.5},
        language=language | {"num_hidden_layers": layers},
        pixels={"min_pixels": 64 * 64, "max_pixels": 256 * 256},
        words=closed_vocabulary(),
    )


def guided_batch(processor):
    dataset = ChatDataset(World(size=128, simple=True), processor, 2, guided=True)
    batch = collate([dataset[0], dataset[1]], processor.tokenizer.pad_token_id)
    guides = {kind: batch.pop(f"{kind}_guides") for kind in GUIDES}
    return batch, guides, batch.pop("labels")


def test_recorded_shares_and_logits_are_those_of_eager_attention():
    model, processor = parts()
    batch, guides, _ = guided_batch(processor)
    model.set_attn_implementation({"text_config": "eager"})
    expected = model(**batch, output_attentions=True)
    guide_attention(model)
    layers = {"mention": 0, "answer": 1}
    guidance = Guidance(layers, guides)
    outputs = model(**batch, guidance=guidance)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)
    for kind, layer in layers.items():
        sequence, position, place = guides[kind].T
        shares = expected.attentions[layer].mean(1)[sequence, position, place]
        torch.testing.assert_close(guidance.shares[kind], shares, atol=1e-5, rtol=1e-4)


NOWHERE = torch.zeros(0, 3, dtype=torch.long)


def guidance_with(kind: str, guides: list[list[int]], shares: list[float]) -> Guidance:
    guidance = Guidance({kind: 3}, {kind: torch.tensor(guides) if guides else NOWHERE})
    guidance.shares = {kind: torch.tensor(shares)}
    return guidance


def test_the_loss_is_minus_the_log_of_the_share_on_all_places_of_a_position():
    guidance = guidance_with("answer", [[0, 2, 0], [0, 2, 1]], [0.3, 0.275])
    assert guidance.loss("answer", torch.ones(1, 3)).item() == pytest.approx(-math.log(0.575), abs=1e-5)
    assert guidance_with("answer", [], []).loss("answer", torch.ones(1, 3)).item() == 0.0


def test_guided_positions_of_questions_count_one_beside_the_weights_of_answers():
    guidance = guidance_with("mention", [[0, 1, 0], [0, 2, 0]], [0.5, 0.25])
    found = guidance.loss("mention", torch.tensor([[0.0, 0.0, 3.0]])).item()
    assert found == pytest.approx((math.log(2) + 3 * math.log(4)) / 4, abs=1e-5)


def test_a_middle_layer_looks_at_what_is_mentioned_and_the_last_at_the_answer():
    found = []
    for layers in (1, 2, 4):
        model, _ = parts(layers)
        assert isinstance(model.config.text_config, LlamaConfig)
        found.append(guided_layers(model))
    assert found == [{"answer": 0}, {"mention": 0, "answer": 1}, {"mention": 1, "answer": 3}]


def test_a_family_whose_attention_cannot_be_told_is_refused(monkeypatch):
    model, _ = parts()
    monkeypatch.setattr(type(model.model.language_model), "_supports_attention_backend", False)
    with pytest.raises(InputError, match="the attention of a llama cannot have attention_supervision"):
        check_attention(model, Stage("guided", 1, {"projector": 1.0}, attention_supervision=0.5))


def test_pointing_teaches_attention_to_look_there():
    model, processor = parts()
    guide_attention(model)
    batch, guides, labels = guided_batch(processor)
    weights = answer_weights(labels, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        guidance = Guidance({"answer": 1}, guides)
        model(**batch, guidance=guidance)
        loss = guidance.loss("answer", weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_under_autocast_attention_runs_in_full_precision(monkeypatch):
    model, processor = parts()
    guide_attention(model)
    batch, guides, _ = guided_batch(processor)
    expected = model(**batch).logits
    seen, attend = [], attention_supervision.sdpa_attention_forward
    monkeypatch.setattr(
        attention_supervision,
        "sdpa_attention_forward",
        lambda module, query, *a, **k: seen.append(query.dtype) or attend(module, query, *a, **k),
    )
    guidance = Guidance({"answer": 1}, guides)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch, guidance=guidance).logits
    assert guidance.shares["answer"].dtype == torch.float32
    assert seen == [torch.float32] * 2
    assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99
