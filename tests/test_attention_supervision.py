"""Attention supervision: recorded shares equal eager attention, and training moves attention to its targets."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig

from convllava.data.collate import TARGET_KINDS, collate
from convllava.data.synthetic_chat import ChatDataset
from convllava.errors import InputError
from convllava.model.builder import build_fresh
from convllava.synthetic import World, closed_vocabulary
from convllava.training.objectives import attention_supervision
from convllava.training.objectives.attention_supervision import (
    AttentionSupervision,
    check_attention,
    enable_attention_supervision,
    supervised_layers,
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


def supervised_batch(processor):
    dataset = ChatDataset(World(size=128, simple=True), processor, 2, attention_targets=True)
    batch = collate([dataset[0], dataset[1]], processor.tokenizer.pad_token_id)
    targets = {kind: batch.pop(f"{kind}_targets") for kind in TARGET_KINDS}
    return batch, targets, batch.pop("labels")


def test_recorded_shares_and_logits_equal_eager_attention():
    model, processor = parts()
    batch, targets, _ = supervised_batch(processor)
    model.set_attn_implementation({"text_config": "eager"})
    expected = model(**batch, output_attentions=True)
    enable_attention_supervision(model)
    layers = {"mention": 0, "answer": 1}
    supervision = AttentionSupervision(layers, targets)
    outputs = model(**batch, attention_supervision=supervision)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)
    for kind, layer in layers.items():
        sequence, position, place = targets[kind].T
        shares = expected.attentions[layer].mean(1)[sequence, position, place]
        torch.testing.assert_close(supervision.shares[kind], shares, atol=1e-5, rtol=1e-4)


NOWHERE = torch.zeros(0, 3, dtype=torch.long)


def supervision_with(kind: str, targets: list[list[int]], shares: list[float]) -> AttentionSupervision:
    supervision = AttentionSupervision({kind: 3}, {kind: torch.tensor(targets) if targets else NOWHERE})
    supervision.shares = {kind: torch.tensor(shares)}
    return supervision


def test_loss_is_minus_the_log_of_the_share_on_all_targets():
    supervision = supervision_with("answer", [[0, 2, 0], [0, 2, 1]], [0.3, 0.275])
    assert supervision.loss("answer", torch.ones(1, 3)).item() == pytest.approx(-math.log(0.575), abs=1e-5)
    assert supervision_with("answer", [], []).loss("answer", torch.ones(1, 3)).item() == 0.0


def test_question_positions_have_weight_one():
    supervision = supervision_with("mention", [[0, 1, 0], [0, 2, 0]], [0.5, 0.25])
    found = supervision.loss("mention", torch.tensor([[0.0, 0.0, 3.0]])).item()
    assert found == pytest.approx((math.log(2) + 3 * math.log(4)) / 4, abs=1e-5)


def test_mentions_supervise_a_middle_layer_and_answers_the_last():
    found = []
    for layers in (1, 2, 4):
        model, _ = parts(layers)
        assert isinstance(model.config.text_config, LlamaConfig)
        found.append(supervised_layers(model))
    assert found == [{"answer": 0}, {"mention": 0, "answer": 1}, {"mention": 1, "answer": 3}]


def test_models_without_the_attention_interface_are_rejected(monkeypatch):
    model, _ = parts()
    monkeypatch.setattr(type(model.model.language_model), "_supports_attention_backend", False)
    with pytest.raises(InputError, match="the attention of a llama cannot have attention_supervision"):
        check_attention(model, Stage("supervised", 1, {"projector": 1.0}, attention_supervision=0.5))


def test_supervision_moves_attention_to_its_targets():
    model, processor = parts()
    enable_attention_supervision(model)
    batch, targets, labels = supervised_batch(processor)
    weights = answer_weights(labels, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        supervision = AttentionSupervision({"answer": 1}, targets)
        model(**batch, attention_supervision=supervision)
        loss = supervision.loss("answer", weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_attention_under_cpu_autocast_runs_in_float32(monkeypatch):
    model, processor = parts()
    enable_attention_supervision(model)
    batch, targets, _ = supervised_batch(processor)
    expected = model(**batch).logits
    seen, attend = [], attention_supervision.sdpa_attention_forward
    monkeypatch.setattr(
        attention_supervision,
        "sdpa_attention_forward",
        lambda module, query, *a, **k: seen.append(query.dtype) or attend(module, query, *a, **k),
    )
    supervision = AttentionSupervision({"answer": 1}, targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch, attention_supervision=supervision).logits
    assert supervision.shares["answer"].dtype == torch.float32
    assert seen == [torch.float32] * 2
    assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99
