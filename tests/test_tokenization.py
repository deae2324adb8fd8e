"""The spelling tokenizer: any text round-trips, known words are one token, and other words are spelled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from convllava.model.tokenizer import build_tokenizer
from convllava.synthetic import World, closed_vocabulary

TOKENIZER = build_tokenizer(("what", "is", "the", "total", "red"))


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    ids = TOKENIZER(" " + text, add_special_tokens=False).input_ids
    if not any(token in text for token in TOKENIZER.all_special_tokens):
        assert TOKENIZER.decode(ids) == text


def test_known_words_are_one_token_and_others_are_spelled():
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER(" What is the Totals 12?").input_ids)
    assert tokens == ["▁What", "▁is", "▁the", "▁", *"Totals", "▁", *"12", "?"]


@pytest.mark.parametrize(
    ("text", "coordinates"),
    [(" [0.12, 0.34, 0.50, 1.00]", 4), (" 10.12, 3", 0), (" costs 0.50 now", 0), (" v1.0.12, x", 0)],
)
def test_coordinates_in_boxes_are_one_token_each(text, coordinates):
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER(text).input_ids)
    assert sum(len(token) == 4 for token in tokens) == coordinates


def test_saved_tokenizer_loads_equal(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|><image> What is the total?<|assistant|> 12.50<|end|>"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert (loaded.padding_side, loaded.pad_token, loaded.eos_token) == ("left", "<|pad|>", "<|end|>")


def test_every_word_of_the_vocabulary_is_one_token():
    tokenizer = build_tokenizer(closed_vocabulary())
    for word in closed_vocabulary():
        assert len(tokenizer(f" {word}").input_ids) == len(tokenizer(f" {word.capitalize()}").input_ids) == 1, word


def test_generated_questions_have_one_token_per_word():
    tokenizer = build_tokenizer(closed_vocabulary())
    world = World(size=256, kinds={"scene": 1})
    turns = [turn for index in range(20) for turn in world.sample(index).turns if turn.task != "ground"]
    for turn in turns:
        words = len(turn.question.replace("?", " ?").replace(".", " .").split())
        assert len(tokenizer(" " + turn.question).input_ids) == words, turn.question
