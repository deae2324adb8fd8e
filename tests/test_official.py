"""Published checkpoints: a converted model reads prompts, trains and answers like the original."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from official_files import CHECKPOINT, DATA, GOLDEN, change
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from convllava import InputError
from convllava.checkpoints import convert, read
from convllava.data.collate import IGNORE, encode
from convllava.data.records import conversation_of
from convllava.model.prompt_templates import FORMATS

CASES = json.loads((DATA / "golden.json").read_text())
SQUARE = CASES["cases"]["square"]
IMAGE_TOKEN = 1000
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(CHECKPOINT, folder, "float32")
    model, processor = read(folder)
    return model.eval(), processor


def prompt(processor, image: str | None, question: str):
    content = [text(question)]
    if image is not None:
        content.insert(0, {"type": "image", "image": Image.open(DATA / "images" / image)})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


def as_original(ids: Tensor) -> list[int]:
    """Replace the placeholders of each image by one -200, as in the original."""
    found: list[int] = []
    for token in ids.tolist():
        if token != IMAGE_TOKEN:
            found.append(token)
        elif not found or found[-1] != -200:
            found.append(-200)
    return found


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def test_pixels_features_logits_and_answer_equal_the_original(parts):
    model, processor = parts
    inputs = prompt(processor, "square.png", SQUARE["question"])
    assert as_original(inputs["input_ids"][0]) == SQUARE["input_ids"]
    assert inputs["pixel_values"].equal(GOLDEN["square/pixel_values"])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=SQUARE["n_new"], do_sample=False)
    torch.testing.assert_close(features.last_hidden_state, GOLDEN["square/vision_features"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(features.pooler_output[0], GOLDEN["square/projected"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, GOLDEN["square/logits"], atol=1e-3, rtol=0)
    assert answer[0, inputs["input_ids"].shape[1] :].tolist() == SQUARE["generated_ids"]


def test_training_labels_and_loss_equal_the_original(parts):
    model, processor = parts
    image = Image.open(DATA / "images" / "wide.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, text("What colour is the square?")]},
        {"role": "assistant", "content": [text("The square is green.")]},
        {"role": "user", "content": [text("And the circle?")]},
        {"role": "assistant", "content": [text("It is red.")]},
    ]
    item = encode(processor, messages)
    expected = CASES["train"]
    assert as_original(item["input_ids"]) == expected["samples"]["A"]["input_ids"]
    assert item["labels"].tolist() == expected["A"]["expanded_labels"][0]
    assert (item["labels"] != IGNORE).sum() == len(expected["samples"]["A"]["supervised_tokens"])
    with torch.no_grad():
        loss = model(
            input_ids=item["input_ids"][None], labels=item["labels"][None], pixel_values=item["pixel_values"]
        ).loss
    assert loss.item() == pytest.approx(expected["A"]["loss"], abs=1e-5)


def test_slow_and_fast_tokenizer_files_give_equal_ids(parts, published):
    for path in (DATA / "extras" / "tokenizer_fast").iterdir():
        shutil.copy(path, published / path.name)
    (published / "tokenizer.model").unlink()
    _, other = read(published)
    _, processor = parts
    for question in ("Describe the image.", "  spaces\tand\nlines ", "Größe? 北京", "a</b> <s"):
        for image in ("wide.png", None):
            ids = [prompt(one, image, question)["input_ids"].tolist() for one in (processor, other)]
            assert ids[0] == ids[1], question


def test_prompt_without_an_image_has_no_image_tokens(parts):
    inputs = prompt(parts[1], None, "Hi there.")
    assert "pixel_values" not in inputs
    assert IMAGE_TOKEN not in inputs["input_ids"]


def test_messages_without_images_are_not_trimmed(parts):
    _, processor = parts
    messages = [{"role": "user", "content": " Hi. "}, {"role": "assistant", "content": " yes\n"}]
    as_parts = [{**message, "content": [text(message["content"])]} for message in messages]
    texts = [processor.apply_chat_template(one) for one in (messages, as_parts)]
    assert texts[0] == texts[1]
    assert texts[0].endswith("USER:  Hi.  ASSISTANT:  yes\n</s>")


@pytest.mark.parametrize("human", ["<image>\nhi", "hi <image>", "hi <image> there\n", " <image>", "no mark \n", "\nno"])
@pytest.mark.parametrize("answer", ["A cat.", " A cat.\n"])
def test_sequences_of_files_equal_the_original(parts, human, answer):
    """Repeat the original preprocessing of one turn: the image mark moves to the front of the trimmed message, and the
    texts before and after it are tokenised separately."""
    _, processor = parts
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    images = {"image": "wide.png"} if "<image>" in human else {}
    sample = conversation_of({"conversations": turns, **images}, 0, str(DATA / "images"))
    item = encode(processor, sample.messages)
    message = ("<image>\n" + human.replace("<image>", "").strip()).strip() if images else human
    system = FORMATS["v1"][1]
    pieces = f"{system} USER: {message} ASSISTANT: {answer}</s>".split("<image>")
    plain = AutoTokenizer.from_pretrained(CHECKPOINT, config=LlamaConfig())
    encoded = [plain(piece).input_ids for piece in pieces]
    expected = encoded[0] + [token for ids in encoded[1:] for token in [-200, *ids[1:]]]
    assert as_original(item["input_ids"]) == expected
    supervised = item["input_ids"][item["labels"] != IGNORE]
    assert supervised.tolist() == plain(f"ASSISTANT: {answer}</s>").input_ids[-len(supervised) :]


@pytest.mark.parametrize(
    ("config", "opening", "end"),
    [
        ({}, "<s> A chat between a curious user and", "questions. USER: <image> \nWhat is it? ASSISTANT: A cat.</s>"),
        ({"conv_mode": "llava_v1"}, "<s> A chat between a curious human and", " ASSISTANT: A cat.</s>"),
        (
            {"version": "llava_llama_2"},
            "<s> [INST] <<SYS>>\nYou are a helpful language and vision assistant.",
            "language.\n<</SYS>>\n\n<image> \nWhat is it? [/INST] A cat. </s>",
        ),
        ({"conv_version": "plain"}, "<s><image> A cat.\n", ""),
    ],
)
def test_configuration_selects_the_prompt_format(published, config, opening, end):
    change(published / "config.json", **config)
    (published.parent / "vicuna").mkdir()
    moved = published.rename(published.parent / "vicuna" / "llava-llama-2-plain")  # this name must have no effect
    _, processor = read(moved)
    found = processor.apply_chat_template(CHAT, tokenize=False)
    assert found.startswith(opening)
    assert found.endswith(end)
    twice = processor.apply_chat_template([*CHAT, *CHAT], tokenize=False)
    if "INST" in opening:
        assert "A cat. </s><s>[INST] <image> \nWhat is it? [/INST]" in twice


def test_unknown_prompt_format_is_rejected(published):
    change(published / "config.json", version="v7")
    with pytest.raises(InputError, match="names the prompt format 'v7'; known are v1"):
        read(published)
