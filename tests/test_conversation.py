"""Conversations as sequences and batches: labels cover exactly the answers, and packed samples do not interact."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import fresh
from training_runs import CHAT, DATA, log, recipe

from convllava.data.attention_targets import CAPTION, answer_spans
from convllava.data.collate import IGNORE, TARGET_KINDS, collate, encode, lengths_of, pack
from convllava.data.synthetic_chat import ChatDataset
from convllava.errors import InputError
from convllava.synthetic import World
from convllava.training import train as engine


def test_labels_are_exactly_the_answers_and_their_ends():
    _, processor = engine.initial_model(recipe(CHAT))
    world = World(size=128, simple=True, turns=3)
    dataset = ChatDataset(world, processor, 4, captions=1.0)
    messages = dataset.messages(world.sample(0), dataset.turns(world.sample(0)))
    item = dataset[0]
    text = processor.tokenizer.decode(item["input_ids"][item["labels"] != IGNORE])
    answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
    assert world.sample(0).caption in answers
    assert text.replace("<|end|> ", "<|end|>") == "".join(f"{answer}<|end|>" for answer in answers)
    assert item["labels"][item["labels"] != IGNORE].equal(item["input_ids"][item["labels"] != IGNORE])


def test_a_template_without_answer_marks_is_rejected():
    _, processor = engine.initial_model(recipe(CHAT))
    processor.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    with pytest.raises(InputError, match="marks no assistant text"):
        encode(processor, [{"role": "user", "content": [{"type": "text", "text": "a"}]}])


def test_batched_loss_equals_the_mean_over_all_supervised_tokens():
    model, processor = engine.initial_model(recipe(CHAT))
    dataset = ChatDataset(World(size=128, simple=True), processor, 3, captions=0.5)
    items = [dataset[index] for index in range(3)]
    batch = model(**collate(items, processor.tokenizer.pad_token_id)).loss
    totals = [(model(**collate([item], 0)).loss, int((item["labels"][1:] != IGNORE).sum())) for item in items]
    expected = sum(loss * count for loss, count in totals) / sum(count for _, count in totals)
    torch.testing.assert_close(batch, expected, atol=1e-5, rtol=1e-5)


def test_loss_does_not_depend_on_padding():
    model, processor = fresh()
    items, pad = mixed_items(processor), processor.tokenizer.pad_token_id
    padded = collate(items, pad, multiple=64)
    assert padded["input_ids"].shape[1] % 64 == 0
    assert padded["input_ids"].shape[1] - collate(items, pad)["input_ids"].shape[1] in range(64)
    torch.testing.assert_close(model(**padded).loss, model(**collate(items, pad)).loss, atol=1e-5, rtol=0)


def test_casual_questions_have_the_same_answers_and_targets():
    _, processor = fresh()
    world = World(size=128, simple=True)
    formal, casual = (ChatDataset(world, processor, 8, casual=share, attention_targets=True) for share in (0.0, 1.0))
    asked = list(zip(*(questions_of(dataset) for dataset in (formal, casual)), strict=True))
    careless = [other for question, other in asked if other.endswith(question.lower().rstrip("?."))]
    opened = [other for question, other in asked if not other.lower().startswith(question.lower().rstrip("?."))]
    assert 0.3 < len(careless) / len(asked) < 0.7
    assert 0.3 < len(opened) / len(asked) < 0.7
    assert all(question.lower().rstrip("?.") in other.lower() for question, other in asked)
    for index in range(8):
        assert answers_and_targets(casual[index]) == answers_and_targets(formal[index])


def test_openings_are_as_frequent_with_a_caption_as_without():
    _, processor = fresh()
    page = World(size=128, simple=True).sample(0)
    dataset = ChatDataset(World(size=128, simple=True), processor, 1, captions=0.5, casual=0.4)
    opened: dict[bool, list[bool]] = {True: [], False: []}
    for index in range(1500):
        sample = dataclasses.replace(page, index=index)
        turns = dataset.turns(sample)
        first = next(number for number, turn in enumerate(turns) if turn.task != CAPTION)
        asked = dataset.messages(sample, turns)[2 * first]["content"][-1]["text"]
        opened[len(turns) > len(page.turns)].append(asked != turns[first].question)
    for found in opened.values():
        assert 0.15 < sum(found) / len(found) < 0.25


def questions_of(dataset: ChatDataset) -> list[str]:
    messages = [message for index in range(len(dataset)) for message in dataset.conversation(index)]
    return [message["content"][-1]["text"] for message in messages if message["role"] == "user"]


def answers_and_targets(item: dict) -> list[tuple]:
    """Return for each answer its tokens and its attention targets."""
    found = []
    for start, stop in answer_spans(item["labels"]):
        pairs = [item[f"{kind}_targets"].tolist() for kind in TARGET_KINDS]
        places = [[(p - start, place) for p, place in kind if start - 1 <= p < stop - 1] for kind in pairs]
        found.append((item["labels"][start:stop].tolist(), places))
    return found


def mixed_items(processor):
    """Two pages, one of them with more turns, and a sample without an image."""
    pages = ChatDataset(World(size=128, simple=True, turns=4), processor, 2)
    return [pages[0], ChatDataset(World(size=128, simple=True, turns=1), processor, 2, images=False)[1], pages[1]]


def test_packed_logits_and_loss_equal_separate():
    model, processor = fresh()
    items = mixed_items(processor)
    with torch.no_grad():
        alone = [model(**collate([item], 0)) for item in items]
        packed = model(**pack(items))
    torch.testing.assert_close(packed.logits[0], torch.cat([out.logits[0] for out in alone]), atol=1e-5, rtol=0)
    counts = torch.tensor([(item["labels"][1:] != IGNORE).sum() for item in items])
    mean = (torch.stack([out.loss for out in alone]) * counts).sum() / counts.sum()
    torch.testing.assert_close(packed.loss, mean, atol=1e-5, rtol=0)


def test_packing_adds_no_positions(parts):
    items = mixed_items(parts[1])
    lengths = [len(item["input_ids"]) for item in items]
    assert lengths_of(pack(items)) == lengths_of(collate(items, 0)) == lengths
    assert pack(items)["input_ids"].shape == (1, sum(lengths))


def test_packing_is_rejected_for_models_that_would_mix_samples(tmp_path):
    plan = recipe(dataclasses.replace(CHAT, packing=True))
    layers = {"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    language = {**plan.model.language, **layers, "num_key_value_heads": 2}
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, language=language))
    with pytest.raises(InputError, match="samples in one row of a lfm2 see each other; leave out packing"):
        engine.train(plan, tmp_path / "run")


def test_a_packed_run_has_the_losses_of_a_padded_run(tmp_path):
    data = dataclasses.replace(DATA, turns=6)
    stage = dataclasses.replace(CHAT, data=data, batch_size=4)
    engine.train(recipe(stage), tmp_path / "padded")
    engine.train(recipe(dataclasses.replace(stage, packing=True)), tmp_path / "packed")
    padded, packed = log(tmp_path / "padded"), log(tmp_path / "packed")
    for one, other in zip(padded, packed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert padded[-1]["positions"] == padded[-1]["padded"] == packed[-1]["padded"]
    assert packed[-1]["tokens"] == packed[-1]["positions"] == padded[-1]["tokens"] < 0.95 * packed[-1]["padded"]
