"""Sequences in one ragged pass equal single sequences, for several families of language models."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from convllava import InputError
from convllava.inference import ragged_attention
from convllava.inference.ragged_attention import RaggedBatch, Span
from convllava.inference.ragged_model import RaggedModel, store_by_columns

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "windows": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
    "neox": GPTNeoXConfig(**SHAPE, rotary_pct=1.0),
}


def causal_lm(config: PreTrainedConfig):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def ragged(model, slots=4):
    return RaggedModel(model.base_model, model.get_output_embeddings(), slots, 64)


def texts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (length,), generator=generator) for length in lengths]


@torch.inference_mode()
def own_logits(model, ids):
    return model(ids[None], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_spans_equal_single_sequences(name):
    model = causal_lm(CONFIGS[name])
    many = ragged(model)
    one, two, three = texts(17, 9, 12)
    expected = torch.stack([own_logits(model, text) for text in (one, two, three)])
    # Read in unequal pieces and out of step, so that a pass holds a whole prompt, a piece and a single token.
    many.forward([Span(2, 0, 7)], many.embed(one[:7]))
    many.forward([Span(0, 0, 8), Span(2, 7, 9)], many.embed(torch.cat([two[:8], one[7:16]])))
    tokens = torch.cat([one[16:], two[8:], three])
    found = many.forward([Span(2, 16, 1), Span(0, 8, 1), Span(3, 0, 12)], many.embed(tokens))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_in_one_attention_call_equal_single_sequences(name, monkeypatch):
    model = causal_lm(CONFIGS[name])
    many = ragged(model)
    written = texts(9, 20, 4, 4)
    expected = torch.stack([own_logits(model, text) for text in written])
    for slot, text in enumerate(written):
        many.forward([Span(slot, 0, len(text) - 1)], many.embed(text[:-1]))
    calls, mask = [], RaggedBatch.mask
    monkeypatch.setattr(RaggedBatch, "mask", lambda batch, run, *rest: calls.append(run) or mask(batch, run, *rest))
    spans = [Span(slot, len(text) - 1, 1) for slot, text in enumerate(written)]
    found = many.forward(spans, many.embed(torch.stack([text[-1] for text in written])))
    assert calls == [tuple(spans)] * 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spans", "calls"),
    [
        ([Span(0, 9, 1), Span(1, 40, 1), Span(2, 3, 1)], 1),
        ([Span(0, 9, 1), Span(2, 9, 1)], 2),
        ([Span(1, 9, 1), Span(0, 9, 1)], 2),
        ([Span(0, 9, 1), Span(1, 0, 2), Span(2, 9, 1)], 3),
        ([Span(0, 9, 1), Span(1, 2000, 1), Span(2, 1999, 1)], 2),
        ([Span(0, 0, 5)], 1),
        ([], 0),
    ],
    ids=["unequal", "a gap", "backwards", "a prompt between", "much longer", "a prompt", "nothing"],
)
def test_neighbouring_slots_share_a_call_if_it_costs_less(spans, calls):
    runs = ragged_attention._runs(spans)
    assert [span for run in runs for span in run] == spans
    assert len(runs) == calls


def test_copied_prefix_continues_as_the_original():
    model = causal_lm(CONFIGS["llama"])
    many = ragged(model)
    (text,) = texts(20)
    many.forward([Span(0, 0, 15)], many.embed(text[:15]))
    many.cache.copy(0, 3, 12)
    found = many.forward([Span(3, 12, 8)], many.embed(text[12:]))
    torch.testing.assert_close(found[0], own_logits(model, text), rtol=1e-4, atol=1e-4)


def test_models_own_forward_stays_equal():
    model = causal_lm(CONFIGS["windows"])
    (text,) = texts(20)
    before = own_logits(model, text)
    ragged(model)
    assert torch.equal(own_logits(model, text), before)


def test_weights_by_columns_give_equal_logits():
    model = causal_lm(CONFIGS["qwen2"])
    (text,) = texts(20)
    before = own_logits(model, text)
    store_by_columns(model)
    weights = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert all(weight.t().is_contiguous() for weight in weights)
    assert model.get_input_embeddings().weight.is_contiguous()
    torch.testing.assert_close(own_logits(model, text), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8), "softcap"),
        (FalconMambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4), "falcon_mamba"),
    ],
)
def test_unsupported_language_models_are_rejected(config, reason):
    model = causal_lm(config)
    with pytest.raises(InputError, match=reason):
        ragged(model)
