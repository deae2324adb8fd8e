"""Assembling a model: every kind of encoder file gives the same tower; new and unused tensors are listed."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import convllava
from convllava import InputError
from convllava.checkpoints import read, write
from convllava.inference import Assistant
from convllava.model.builder import build_fresh, initialise_coordinates
from convllava.model.config import ConvLlavaVisionConfig
from convllava.model.tokenizer import build_tokenizer
from convllava.model.vision_tower import ConvLlavaVisionModel

DEPTHS, WIDTHS = [1, 2, 1, 1], [8, 12, 16, 24]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = ConvNextConfig(depths=DEPTHS, hidden_sizes=WIDTHS, layer_scale_init_value=0.5)
    return ConvNextForImageClassification(config).eval()


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    tokenizer = build_tokenizer(["what", "colour"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def as_timm(state: dict) -> dict:
    """Return the tensors of a Hugging Face ConvNeXt under timm's names."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("convnext.").replace("embeddings.patch_embeddings", "stem.0")
        name = name.replace("embeddings.layernorm", "stem.1")
        if re.match(r"(layernorm|classifier)\.", name):
            name = f"head.{name}"
        name = name.replace("encoder.", "").replace("downsampling_layer", "downsample").replace(".layers.", ".blocks.")
        name = name.replace("layer_scale_parameter", "gamma").replace("dwconv", "conv_dw")
        name = re.sub(r"(blocks\.\d+)\.layernorm", r"\1.norm", name)
        renamed[name.replace("pwconv", "mlp.fc")] = tensor
    return renamed


def as_dinov3(state: dict) -> dict:
    """Return the tensors of a Hugging Face ConvNeXt under the names of dinov3_convnext."""
    renamed = {}
    for name, tensor in as_timm(state).items():
        name = name.replace("stem.", "stages.0.downsample_layers.").replace(".downsample.", ".downsample_layers.")
        name = (
            name.replace("conv_dw", "depthwise_conv")
            .replace(".norm.", ".layer_norm.")
            .replace("mlp.fc", "pointwise_conv")
        )
        renamed[f"model.{name.replace('blocks', 'layers')}"] = tensor
    return renamed


def test_all_encoder_formats_give_the_same_tower(encoder, language, tmp_path):
    encoder.save_pretrained(tmp_path / "convnext")
    state = encoder.state_dict()
    open_clip = {f"visual.trunk.{name}": tensor for name, tensor in as_timm(state).items()} | {
        "logit_scale": torch.ones(1)
    }
    sources = (tmp_path / "convnext", as_timm(state), open_clip, as_dinov3(state))
    models = [convllava.build(vision=source, language=language, stage5_depth=2).model for source in sources]
    for other in models[1:]:
        for (name, a), b in zip(models[0].state_dict().items(), other.state_dict().values(), strict=True):
            assert a.equal(b), name
    pixels = torch.randn(1, 3, 64, 64)
    four = ConvLlavaVisionModel(type(models[0].config.vision_config)(depths=DEPTHS, hidden_sizes=WIDTHS)).eval()
    four.load_state_dict({k: v for k, v in models[0].model.vision_tower.state_dict().items() if "stages.4." not in k})
    with torch.no_grad():
        expected = encoder.convnext(pixels).last_hidden_state.flatten(2)[0].T
        torch.testing.assert_close(four(pixels).last_hidden_state, expected, atol=1e-4, rtol=0)


def test_new_and_unused_tensors_are_listed(encoder, language, tmp_path):
    assembly = convllava.build(vision=encoder.state_dict(), language=language, stage5_depth=3, row_separator=True)
    config = assembly.model.config.vision_config
    assert list(config.depths) == [*DEPTHS, 3]
    assert list(config.hidden_sizes) == [*WIDTHS, 48]
    assert {name.partition("stages.4")[0] for name in assembly.new} <= {
        "model.vision_tower.encoder.",
        *(f"model.multi_modal_projector.{name}" for name in ("linear_1.weight", "linear_1.bias", "row_separator")),
        *(f"model.multi_modal_projector.linear_2.{name}" for name in ("weight", "bias")),
    }
    assert sorted(assembly.left_over) == sorted(
        name for name in encoder.state_dict() if name.startswith(("convnext.layernorm.", "classifier."))
    )
    assert [str(cell) for cell in assembly.table().columns[0].cells][-2:] == ["encoder convnext", "encoder classifier"]
    fifth = assembly.model.model.vision_tower.encoder.stages[4]
    assert fifth.layers[0].pwconv1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (fifth.layers[0].layer_scale_parameter == config.layer_scale_init_value).all()


def test_assembled_model_answers_equally_after_reloading(encoder, language, tmp_path):
    assembly = convllava.build(
        vision=encoder.state_dict(), language=language, stage5_depth=1, pixels={"min_pixels": 4096, "max_pixels": 65536}
    )
    write(assembly.model, assembly.processor, tmp_path / "model")
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    first = Assistant(assembly.model.eval(), assembly.processor).ask(image, "What colour?", max_new_tokens=3)
    second = Assistant(*read(tmp_path / "model")).ask(image, "What colour?", max_new_tokens=3)
    assert first == second


def test_existing_fifth_stage_with_a_missing_tensor_is_rejected(encoder, language):
    shape = ConvLlavaVisionConfig(depths=[1] * 5, hidden_sizes=[8, 8, 16, 16, 32])
    state = dict(ConvLlavaVisionModel(shape).state_dict())
    convllava.build(vision=state, language=language, stage5_depth=0)
    del state["encoder.stages.4.layers.0.pwconv1.weight"]
    with pytest.raises(InputError, match=r"the encoder lacks encoder\.stages\.4\.layers\.0\.pwconv1\.weight"):
        convllava.build(vision=state, language=language, stage5_depth=0)


def test_generation_config_keeps_only_the_end_token(encoder, language, tmp_path):
    shutil.copytree(language, tmp_path / "language")
    GenerationConfig(repetition_penalty=1.1, do_sample=True, eos_token_id=3).save_pretrained(tmp_path / "language")
    found = convllava.build(vision=encoder.state_dict(), language=tmp_path / "language").model.generation_config
    assert (found.eos_token_id, found.repetition_penalty, found.do_sample) == (3, None, None)


def test_mismatched_encoder_tensor_is_named(encoder, language, tmp_path):
    state = dict(encoder.state_dict())
    state["convnext.encoder.stages.1.layers.0.pwconv1.weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"stages\.1\.layers\.0\.pwconv1\.weight has the shape \[3, 3\]"):
        convllava.build(vision=state, language=language)
    with pytest.raises(InputError, match="there is no ConvNeXt in it"):
        convllava.build(vision={"a": torch.zeros(1)}, language=language)
    with pytest.raises(InputError, match="does not load as a causal language model"):
        convllava.build(vision=encoder.state_dict(), language=tmp_path)


def test_nearby_coordinates_start_with_similar_embeddings():
    weight = torch.randn(120, 256)
    before = weight.clone()
    initialise_coordinates(weight, range(10, 111))
    curve = torch.nn.functional.normalize(weight[10:111], dim=1)
    similarity = (curve @ curve.T)[50]
    near, far = similarity[[49, 51]].min(), similarity[[20, 80]].abs().max()
    assert near > 0.95
    assert far < 0.3
    assert weight[10:111].std().item() == pytest.approx(float(before.std()), rel=0.1)
    others = [*range(10), *range(111, 120)]
    assert torch.equal(weight[others], before[others])


@pytest.mark.parametrize("tied", [True, False])
def test_fresh_coordinates_are_similar_in_both_embedding_tables(tied):
    model, processor = build_fresh(
        vision={"depths": [1] * 5, "hidden_sizes": [8] * 5},
        language={"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "tie_word_embeddings": tied},
        pixels={},
        words=["red"],
    )
    near, far = (processor.tokenizer.convert_tokens_to_ids(pair) for pair in (["0.37", "0.38"], ["0.10", "0.90"]))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = torch.nn.functional.normalize(table.weight.detach(), dim=1)
        assert rows[near[0]] @ rows[near[1]] > 0.9
        assert rows[far[0]] @ rows[far[1]] < 0.5
