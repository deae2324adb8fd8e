"""The closed form of memory equals what autograd keeps; an out-of-memory error names sizes and remedies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from training_runs import CHAT, recipe

from convllava.errors import InputError
from convllava.model.config import ConvLlavaConfig
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.packed import SMALL_WEIGHT
from convllava.training import train as engine
from convllava.training.memory import language_activations, memory_of, tower_activations
from convllava.training.recipe import Adapter

WIDTH = {"hidden_sizes": [16, 32, 64, 128, 256], "depths": [2, 2, 3, 2, 2]}
TEXT = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 300,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def kept_bytes(module, run):
    """Return the bytes that autograd keeps for the backward pass, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(size for size, _ in kept.values())


def downsampling_weights(tower):
    """Return the downsampling weights that train."""
    layers = [layer for stage in tower.encoder.stages for layer in stage.downsampling_layer]
    return [layer.weight for layer in layers if layer.weight.ndim == 4 and layer.weight.requires_grad]


@pytest.mark.parametrize(("first", "checkpointing"), [(1, False), (3, False), (5, False), (1, True)])
def test_counted_activations_equal_what_autograd_keeps(first, checkpointing):
    config = ConvLlavaConfig(vision_config=WIDTH, text_config=TEXT)
    model = ConvLlavaForConditionalGeneration(config).train()
    parts = ["stem"] if first == 1 else [f"stage{number}" for number in range(first, 6)]
    stage = dataclasses.replace(CHAT, learning_rates=dict.fromkeys(parts, 1.0), gradient_checkpointing=checkpointing)
    tower, language = model.model.vision_tower, model.model.language_model
    tower.requires_grad_(first == 1)
    for number, part in enumerate(tower.encoder.stages, start=1):
        part.requires_grad_(number >= first)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    images, embeddings = [torch.randn(3, 128, 256), torch.randn(3, 192, 64)], torch.randn(2, 90, 64, requires_grad=True)
    pixels = sum(image.numel() // 3 for image in images)
    counted = tower_activations(config.vision_config, stage, pixels)
    counted_text = language_activations(config.text_config, stage, 180)
    # Autograd also keeps copies of small weights, whose memory order differs from that of patches.
    counted += sum(4 * weight.numel() for weight in downsampling_weights(tower) if weight.numel() <= SMALL_WEIGHT)
    if checkpointing:  # one layer's values during recomputation, which happens after the count below
        counted -= 4 * 12 * WIDTH["hidden_sizes"][0] * pixels // 16
        counted_text -= 4 * 180 * (8 * 64 + 2 * 32 + 4 * 160)
    assert kept_bytes(tower, lambda: tower(images).last_hidden_state) == pytest.approx(counted, rel=0.03)
    kept = kept_bytes(language, lambda: language(inputs_embeds=embeddings, use_cache=False).last_hidden_state)
    assert kept == pytest.approx(counted_text, rel=0.03)


def test_processes_share_states_but_not_activations():
    config = ConvLlavaConfig(vision_config=WIDTH, text_config=TEXT)
    whole = memory_of(2 * 10**9, 2 * 10**9, config, CHAT, 10**6, 10**4)
    shared = memory_of(2 * 10**9, 2 * 10**9, config, CHAT, 10**6, 10**4, processes=8)
    assert (whole["weights"], whole["gradients"], whole["optimizer"]) == (8.0, 8.0, 16.0)
    assert (shared["weights"], shared["gradients"], shared["optimizer"]) == (1.0, 1.0, 2.0)
    assert shared["tower"] == whole["tower"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_sizes_and_remedies(tmp_path, monkeypatch, error):
    def failing(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(ConvLlavaForConditionalGeneration, "forward", failing)
    with pytest.raises(InputError) as caught:
        engine.train(recipe(CHAT), tmp_path / "run")
    message = str(caught.value)
    assert "out of memory in stage chat, in a micro-batch of 2 images with" in message
    assert "weights 0" in message
    for remedy in (
        "gradient_accumulation_steps: 2",
        "gradient_checkpointing: true",
        "precision: bfloat16",
        "adapter",
        "fsdp",
    ):
        assert remedy in message
    smaller = dataclasses.replace(CHAT, batch_size=1, gradient_checkpointing=True, adapter=Adapter(rank=2))
    with pytest.raises(InputError) as caught:
        engine.train(recipe(smaller), tmp_path / "smaller")
    assert "gradient_accumulation_steps" not in str(caught.value)
    assert "adapter" not in str(caught.value)


def test_other_errors_pass_through(tmp_path, monkeypatch):
    def failing(self, *args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(ConvLlavaForConditionalGeneration, "forward", failing)
    with pytest.raises(RuntimeError, match="shapes differ"):
        engine.train(recipe(CHAT), tmp_path / "run")
