"""Attention guidance: the shares that are recorded are those of the attention, and pointing teaches to look."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig

from convllava.building import build_fresh
from convllava.data.conversation import collate
from convllava.data.synthetic import ChatDataset
from convllava.errors import InputError
from convllava.synthetic import World, closed_vocabulary
from convllava.training.attention import Guidance, check_attention, guide_attention, guided_layers
from convllava.training.losses import answer_weights
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
    return batch, batch.pop("answer_guides"), batch.pop("mention_guides"), batch.pop("labels")


def test_recorded_shares_and_logits_are_those_of_eager_attention():
    model, processor = parts()
    batch, answers, mentions, _ = guided_batch(processor)
    model.set_attn_implementation({"text_config": "eager"})
    expected = model(**batch, output_attentions=True)
    guide_attention(model)
    guidance = Guidance({0: mentions, 1: answers})
    outputs = model(**batch, guidance=guidance)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)
    for layer, guides in guidance.guides.items():
        sequence, position, place = guides.T
        shares = expected.attentions[layer].mean(1)[sequence, position, place]
        torch.testing.assert_close(guidance.shares[layer], shares, atol=1e-5, rtol=1e-4)


def test_the_loss_is_minus_the_log_of_the_share_on_all_places_of_a_position():
    guidance = Guidance({3: torch.tensor([[0, 2, 0], [0, 2, 1]]), 4: torch.zeros(0, 3, dtype=torch.long)})
    guidance.shares = {3: torch.tensor([0.3, 0.275]), 4: torch.zeros(0)}
    alike = torch.ones(1, 3)
    assert guidance.loss(3, alike).item() == pytest.approx(-math.log(0.575), abs=1e-5)
    assert guidance.loss(4, alike).item() == 0.0


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
    with pytest.raises(InputError, match="the attention of a llama cannot have guidance"):
        check_attention(model, Stage("guided", 1, {"projector": 1.0}, guidance=0.5))


def test_pointing_teaches_attention_to_look_there():
    model, processor = parts()
    guide_attention(model)
    batch, answers, _, labels = guided_batch(processor)
    weights = answer_weights(labels, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        guidance = Guidance({1: answers})
        model(**batch, guidance=guidance)
        loss = guidance.loss(1, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
