"""Answers: images of all types, streams, chats and batches equal `generate`; bad input is rejected."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from conftest import picture
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.utils import logging

from convllava import InputError, load
from convllava.checkpoints import write
from convllava.inference import Assistant
from convllava.synthetic import World

SETTINGS = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def assistant(parts):
    return Assistant(*parts)


def test_ask_equals_plain_generation(assistant):
    image = picture(70, 200)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    inputs = assistant.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    output = assistant.model.generate(**inputs, do_sample=False, **SETTINGS)
    expected = assistant.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert assistant.ask(image, "what?", **SETTINGS) == expected


def test_all_image_types_give_the_same_answer(assistant, tmp_path):
    image = picture(64, 128)
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    forms = [image, tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image), buffer.getvalue()]
    answers = {assistant.ask(form, "what?", **SETTINGS) for form in forms}
    assert len(answers) == 1


def test_encoded_images_skip_the_image_count_of_transformers(assistant, monkeypatch):
    expected = assistant.ask(picture(64, 64), "what?", **SETTINGS)

    def count(*args, **kwargs):
        raise ValueError("Could not make a flat list of images")

    monkeypatch.setattr(
        "transformers.ProcessorMixin.validate_inputs", count
    )  # it counts images since transformers 5.23
    assert assistant.ask(assistant.encode(picture(64, 64)), "what?", **SETTINGS) == expected


def test_processor_without_images_and_text_is_rejected(assistant):
    with pytest.raises(InputError, match="give images, a text or both"):
        assistant.processor()


def test_streamed_pieces_equal_the_whole_answer(assistant):
    pieces = list(assistant.stream(picture(64, 64), "what is red?", **SETTINGS))
    assert len(pieces) > 1
    assert "".join(pieces) == assistant.ask(picture(64, 64), "what is red?", **SETTINGS)


def test_closed_stream_ends_its_answer(assistant):
    pieces = assistant.stream(picture(64, 64), "what is red?", max_new_tokens=400)
    next(pieces)
    pieces.close()
    steps = assistant._engine.stats.steps
    assistant.ask(picture(64, 64), "what?", max_new_tokens=2)
    assert assistant._engine.stats.steps <= steps + 3
    assert assistant._engine.running == 0


def test_sampling_options_of_an_answer(assistant):
    image = picture(64, 64)
    whole = assistant.ask(image, "what is red?", max_new_tokens=12)
    assert assistant.ask(image, "what is red?", max_new_tokens=12, stop=whole[2:5]) == whole[: whole.index(whole[2:5])]
    drawn = {assistant.ask(image, "what?", temperature=2.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2)}
    assert len(drawn) == 2
    with pytest.raises(InputError, match="`top_p` is 0"):
        assistant.ask(image, "what?", top_p=0)
    with pytest.raises(TypeError, match="num_beams"):
        assistant.ask(image, "what?", num_beams=2)


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": [{"text": "x"}]}, "x"]
)
def test_malformed_messages_are_rejected(assistant, message):
    with pytest.raises(InputError, match="message"):
        assistant.chat([message], [picture(64, 64)])


def test_batched_answers_equal_single(assistant):
    images = [picture(64, 64, 1), picture(130, 64, 2), picture(64, 300, 3)]
    questions = [(images[i % 3], f"what is {'red ' * (i % 4)}?") for i in range(7)]
    batched = [answer for batch in assistant.answer_many(questions, batch_size=3, **SETTINGS) for answer in batch]
    assert batched == [assistant.ask(image, question, **SETTINGS) for image, question in questions]


def test_chat_puts_images_at_their_parts(assistant):
    first, second = picture(64, 64, 1), picture(64, 128, 2)
    marks = [{"type": "image"}, {"type": "text", "text": "what?"}]
    explicit = [
        {"role": "user", "content": marks},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": marks},
    ]
    assert assistant.chat(explicit, [first, second], **SETTINGS) != assistant.chat(
        explicit, [second, first], **SETTINGS
    )
    front = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]}]
    plain = [{"role": "user", "content": "what?"}]
    assert assistant.chat(plain, [first, second], **SETTINGS) == assistant.chat(front, [first, second], **SETTINGS)
    assert isinstance(assistant.chat(plain, **SETTINGS), str)


def test_batched_conversations_equal_single_next_to_errors():
    assistant = load("tiny", device="cpu")
    first, second = (World("heldout", seed=1, size=256).sample(index).image for index in range(2))
    read = [{"role": "user", "content": "Read the page."}]
    conversations = [(read, [first, second]), ([{"role": "user", "content": "What?"}], []), (read, [second])]
    wrong = [(read, [b"no image"]), ([{"role": "user", "content": "what " * 9000}], [])]
    batched = assistant.chat_many([*conversations[:1], *wrong, *conversations[1:]], max_new_tokens=24)
    single = [assistant.chat(messages, images, max_new_tokens=24) for messages, images in conversations]
    assert [batched[0], *batched[3:]] == single
    assert all(isinstance(error, InputError) for error in batched[1:3])
    assert len(set(single)) == 3


def test_report_measures_its_answer(assistant):
    report = assistant.report(picture(70, 200), "what?", max_new_tokens=6)
    assert report["answer"] == assistant.ask(picture(70, 200), "what?", **SETTINGS)
    assert report["image_size"] == [200, 70]
    assert report["resized_to"] == [192, 64]
    assert report["visual_tokens"] == 3 + 1
    assert 0 < report["seconds_to_first_token"] <= report["seconds"]


def test_bad_prompts_are_rejected(assistant):
    image = picture(64, 64)
    with pytest.raises(InputError, match="literal mark <image>"):
        assistant.ask(image, "an <image>?")
    with pytest.raises(InputError, match="user message is not UTF-8 at its character 6; write it again"):
        assistant.ask(image, "what \udcff?")
    with pytest.raises(InputError, match="1 <image> mark but 2 images"):
        assistant.chat([{"role": "user", "content": [{"type": "image"}]}], [image, image])
    with pytest.raises(InputError, match="the context is 512; shorten"):
        assistant.ask(image, "what " * 600)


def test_model_from_a_folder_gives_equal_answers(parts, tmp_path):
    write(*parts, tmp_path / "model")
    assert load(tmp_path / "model").ask(picture(64, 64), "what?", **SETTINGS) == Assistant(*parts).ask(
        picture(64, 64), "what?", **SETTINGS
    )


def test_load_shows_no_progress_bar_and_restores_the_setting(parts, tmp_path, capfd):
    write(*parts, tmp_path / "model")
    logging.enable_progress_bar()
    load(tmp_path / "model")
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_weights_on_a_cpu_are_float32(parts, tmp_path, device):
    write(*parts, tmp_path / "model")
    assert load(tmp_path / "model", device=device).model.dtype == torch.float32


@pytest.mark.parametrize("name", ["tinny", "./nowhere", "/no/where", "a/b/c"])
def test_unknown_models_are_rejected(name):
    with pytest.raises(InputError, match=r"there is no model .*tiny"):
        load(name)


def test_broken_folders_are_rejected(parts, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path / "empty")
    write(*parts, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not load as a ConvLLaVA model"):
        load(tmp_path / "cut")


def test_image_with_many_questions_is_encoded_once(assistant):
    calls = []
    handle = assistant.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    images = [picture(64, 64, 1), picture(64, 64, 2)]
    list(assistant.answer_many([(image, "what?") for image in images for _ in range(6)], batch_size=4, **SETTINGS))
    handle.remove()
    assert len(calls) == 2


def test_incomplete_weights_are_rejected(parts, tmp_path):
    write(*parts, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match=f"lacks the tensor {name}"):
        load(tmp_path / "model")


def test_other_model_types_are_rejected(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="of type llama, not convllava"):
        load(tmp_path)
