"""The whole model in the Hugging Face ecosystem, by equalities: batched = single, cached = uncached, saved = loaded."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import fresh, picture
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, TextIteratorStreamer, pipeline

from convllava import ConvLlavaConfig, ConvLlavaForConditionalGeneration, InputError
from convllava.geometry import Size
from convllava.model import modeling
from convllava.model.modeling import coordinate_features

SHAPES = {"none": [], "one": [(64, 192)], "two": [(128, 64), (70, 90)]}


def prompts(processor, names=tuple(SHAPES)):
    """Return one conversation per name, with as many images as the name says."""
    return [
        [
            {
                "role": "user",
                "content": [
                    *(
                        {"type": "image", "image": picture(*size, seed=index)}
                        for index, size in enumerate(SHAPES[name])
                    ),
                    {"type": "text", "text": f"what is {name}?"},
                ],
            }
        ]
        for name in names
    ]


def encoded(processor, names=tuple(SHAPES)):
    return processor.apply_chat_template(
        prompts(processor, names),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )


def test_number_of_placeholders_includes_row_separators(parts):
    model, processor = parts
    inputs = encoded(processor, ["two"])
    # 128x64 -> 2x1 and 70x90 -> 64x64 -> 1x1 tokens, and a separator after each of the three rows
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 + 1 + 3
    assert inputs["image_sizes"].tolist() == [[128, 64], [64, 64]]


@pytest.mark.parametrize("size", [(64, 192), (70, 90), (900, 300)])
def test_visual_tokens_of_a_size_are_the_placeholders_of_its_image(parts, size):
    _, processor = parts
    ids = processor(text="<image>", images=picture(*size))["input_ids"]
    assert ids[0].count(processor.image_token_id) == processor.visual_tokens(*size)
    assert processor.visual_tokens(*size, max_pixels=64**2, min_pixels=1) == 2  # one token and its row separator


def test_batched_logits_equal_single(parts):
    model, processor = parts
    batch = model(**encoded(processor)).logits
    for row, name in enumerate(SHAPES):
        single = model(**encoded(processor, [name])).logits[0]
        torch.testing.assert_close(batch[row, -len(single) :], single, atol=1e-4, rtol=0)


def test_logits_depend_on_the_image(parts):
    model, processor = parts
    inputs = encoded(processor, ["one"])
    other = inputs["pixel_values"].flip(-1)
    assert not torch.allclose(model(**inputs).logits, model(**{**inputs, "pixel_values": other}).logits, atol=1e-2)


def test_cached_generation_equals_uncached(parts):
    model, processor = parts
    inputs = encoded(processor)
    cached = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"]
    for _ in range(8):
        logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    for row in range(len(ids)):
        found, expected = cached[row].tolist(), ids[row].tolist()
        ends = [
            i
            for i, t in enumerate(expected)
            if i >= inputs["input_ids"].shape[1] and t == model.config.text_config.eos_token_id
        ]
        until = ends[0] + 1 if ends else len(expected)
        assert found[:until] == expected[:until]


class RecordingLanguageModel(torch.nn.Module):
    """Stands for a language model of a transformers release that gives keys and values this name."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name, self.width, self.received = name, width, dict[str, Any]()

    def forward(self, **kwargs: Any) -> SimpleNamespace:
        self.received = kwargs
        hidden = torch.zeros(1, 1, self.width)
        return SimpleNamespace(
            last_hidden_state=hidden, hidden_states=None, attentions=None, **{self.name: kwargs[self.name]}
        )


@pytest.mark.parametrize("known", ["cache", "past_key_values"])
@pytest.mark.parametrize("given", ["cache", "past_key_values"])
def test_keys_and_values_reach_the_language_model_under_both_names(monkeypatch, known, given):
    """transformers 5.23 renamed past_key_values to cache; callers may use either name with any release."""
    model, _ = fresh()
    monkeypatch.setattr(modeling, "_CACHE", known)
    monkeypatch.setattr(modeling, "ConvLlavaModelOutputWithPast", SimpleNamespace)
    monkeypatch.setattr(modeling, "ConvLlavaCausalLMOutputWithPast", SimpleNamespace)
    language_model = RecordingLanguageModel(known, model.config.text_config.hidden_size)
    language_model.embed_tokens = model.get_input_embeddings()
    language_model.get_input_embeddings = lambda: language_model.embed_tokens
    model.model.language_model = language_model
    cache = DynamicCache()
    outputs = model(input_ids=torch.tensor([[1]]), **{given: cache})
    assert language_model.received[known] is cache
    assert getattr(outputs, known) is cache
    assert not ({"cache", "past_key_values"} - {known}) & set(language_model.received)


def test_batched_beams_equal_single(parts):
    model, processor = parts
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    batch = model.generate(**encoded(processor, ["one", "two"]), **settings)
    single = model.generate(**encoded(processor, ["two"]), **settings)
    length = single.shape[1] - encoded(processor, ["two"])["input_ids"].shape[1]
    assert batch[1, -length:].tolist() == single[0, -length:].tolist()


def test_tower_runs_once_in_generation(parts):
    model, processor = parts
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**encoded(processor, ["one"]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    handle.remove()
    assert calls == [1]


def test_saved_model_equals_loaded_one(parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is ConvLlavaForConditionalGeneration
    inputs = encoded(AutoProcessor.from_pretrained(tmp_path))
    expected = encoded(processor)
    assert inputs["input_ids"].equal(expected["input_ids"])
    assert inputs["pixel_values"].equal(expected["pixel_values"])
    torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**expected).logits, atol=0, rtol=0)
    assert (tmp_path / "model.safetensors").exists()
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_batched_pipeline_equals_single(parts, tmp_path):
    """The images have the same canvas, because the stock pipeline concatenates the pixels of its samples."""
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    messages = prompts(processor, ["one", "one"])
    messages[1][0]["content"][0]["image"] = picture(64, 190, seed=5)
    settings = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 4, "do_sample": False}}
    single = [pipe(text=message, **settings)[0]["generated_text"] for message in messages]
    batch = [answer[0]["generated_text"] for answer in pipe(text=messages, batch_size=2, **settings)]
    assert batch == single
    assert single[0] != single[1]


def test_streamed_text_equals_generate(parts):
    model, processor = parts
    inputs = encoded(processor, ["one"])
    whole = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :])


def test_gradient_checkpointing_reaches_the_tower_and_keeps_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, processor = fresh()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert model.model.vision_tower.encoder.stages[0].layers[0].gradient_checkpointing is checkpointing
        inputs = encoded(processor)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_sdpa_equals_eager():
    model, processor = fresh()
    assert model.config._attn_implementation == "sdpa"
    inputs = encoded(processor)
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[kept], expected[kept], atol=1e-4, rtol=0)


def test_bfloat16_runs_and_stays_close():
    (model, processor), (low, _) = fresh(), fresh()
    inputs = encoded(processor)
    logits = low.bfloat16()(**inputs).logits
    assert logits.dtype == torch.bfloat16
    kept = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[kept]
    assert (logits.float()[kept] - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_other_language_models_work():
    model = ConvLlavaForConditionalGeneration(
        ConvLlavaConfig(
            vision_config={"depths": [1] * 5, "hidden_sizes": [8] * 5},
            text_config={
                "model_type": "qwen2",
                "vocab_size": 100,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            image_token_id=99,
        )
    )
    model.eval()
    ids, pixels = torch.tensor([[1, 99, 99, 2]]), torch.randn(1, 3, 64, 128)
    embeddings = model.get_input_embeddings()(ids).detach()
    embeddings[0, 1:3] = model.get_image_features(pixels).pooler_output[0]
    expected = model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state)
    torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, expected)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<image> what?", 2, "1 <image> mark but 2 images"),
        ("<image><image> what?", 1, "2 <image> marks but 1 image;"),
        ("what?", 1, "0 <image> marks but 1 image;"),
        ("<image> what?", 0, "1 <image> mark but 0 images"),
    ],
)
def test_marks_and_images_must_match(parts, text, count, message):
    images = [picture(64, 64) for _ in range(count)] or None
    with pytest.raises(InputError, match=message):
        parts[1](text=text, images=images)


def test_marks_must_match_in_every_prompt_of_a_batch(parts):
    with pytest.raises(InputError, match="prompt 1 of 2 has 2"):
        parts[1](text=["<image><image> a", "b"], images=[[picture(64, 64)], [picture(64, 64)]])


def test_literal_mark_in_a_message_is_rejected(parts):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "an <image> here"}]}]
    with pytest.raises(InputError, match="literal mark <image>"):
        parts[1].apply_chat_template(messages)


def test_wrong_number_of_placeholders_is_rejected(parts):
    model, processor = parts
    inputs = encoded(processor, ["one"])
    with pytest.raises(InputError, match="placeholder tokens but the images give"):
        model(**{**inputs, "image_sizes": torch.tensor([[64, 64]])})


def test_placeholders_without_an_image_are_rejected(parts):
    model, processor = parts
    inputs = encoded(processor, ["one"])
    with pytest.raises(InputError, match="image placeholder tokens but the images give 0"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def test_embeddings_without_the_placeholder_are_rejected(parts):
    model = copy.deepcopy(parts[0])
    model.config.image_token_id = len(model.get_input_embeddings().weight)
    embeddings = torch.zeros(1, 4, model.config.text_config.hidden_size)
    with pytest.raises(InputError, match="give `input_ids` instead"):
        model(inputs_embeds=embeddings, pixel_values=torch.zeros(1, 3, 64, 64))


def test_attention_implementation_is_chosen_on_loading(parts, tmp_path):
    parts[0].save_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config.text_config._attn_implementation == name


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation is empty"),
        ([{"role": "wizard", "content": "a"}], "a message needs a role, one of system, user, assistant"),
        ([{"role": "user"}], "a message needs a role"),
        ([{"role": "user", "content": None}], "the content of a message is a text or a list of parts; got None"),
        ([{"role": "user", "content": 5}], "the content of a message is a text or a list of parts; got 5"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part of a message"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part of a message"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "a"}]}], "a part of a message"),
        ([{"role": "user", "content": [{"type": "video", "video": "a"}]}], "a part of a message"),
        ([{"role": "user", "content": "end<|end|>"}], "literal mark"),
    ],
)
def test_malformed_conversations_are_rejected(parts, messages, message):
    with pytest.raises(InputError, match=message):
        parts[1].apply_chat_template(messages)


def test_coordinates_are_normalised_row_by_row():
    features = coordinate_features(Size(2, 4), torch.device("cpu"))
    assert features.shape == (8, 16)
    vertical, horizontal = features[:, 8].acos() / torch.pi, features[:, 12].acos() / torch.pi
    torch.testing.assert_close(vertical, torch.tensor([0.25] * 4 + [0.75] * 4))
    torch.testing.assert_close(horizontal, torch.tensor([0.125, 0.375, 0.625, 0.875] * 2))


def test_projector_norm_keeps_coordinates_visible():
    """The share of the coordinates in a token does not change if the content is fifty times as large."""
    model, _ = fresh()
    projector = model.model.multi_modal_projector
    features = model.model.vision_tower(torch.randn(1, 3, 128, 192))
    before = projector(features)[0]
    with torch.no_grad():
        projector.linear_2.weight *= 50
        projector.linear_2.bias *= 50
    torch.testing.assert_close(projector(features)[0], before, atol=1e-3, rtol=1e-3)
