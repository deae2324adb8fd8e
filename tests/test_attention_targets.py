"""Attention targets: the cells of the page that contain an answer, and the visual tokens of these cells."""

from __future__ import annotations

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from convllava.data.attention_targets import (
    FIRST_POSITION,
    PageCells,
    answer_cells,
    answer_spans,
    caption_cells,
    mentioned_cells,
    question_span,
    spelled_cells,
    token_cells,
    whole_word_cells,
)
from convllava.data.dense_labels import label_maps
from convllava.data.synthetic_chat import ChatDataset
from convllava.geometry import Size, crop, square, unchanged
from convllava.model.builder import build_fresh
from convllava.model.processing import ConvLlavaProcessor
from convllava.synthetic import Glyph, Sample, Thing, Turn, World, closed_vocabulary


def page(printed: str = "", things: tuple[Thing, ...] = (), kind: str = "sign") -> PageCells:
    """Return a 64 x 64 page of 4 x 4 cells: one character per cell in reading order, none for a space; and things."""
    places = [(16 * (number % 4), 16 * (number // 4)) for number in range(len(printed))]
    glyphs = tuple(
        Glyph(char, (x + 1, y + 4, x + 15, y + 12), begins=before == " ")
        for before, char, (x, y) in zip(" " + printed, printed, places, strict=False)
        if char != " "
    )
    return PageCells(
        Sample(0, kind, Image.new("RGB", (64, 64)), "", (), glyphs, things), unchanged(Size(64, 64), stride=16), 16
    )


def small_processor() -> ConvLlavaProcessor:
    return build_fresh(
        vision={"depths": [1] * 5, "hidden_sizes": [8] * 5},
        language={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16},
        pixels={"min_pixels": 64 * 64, "max_pixels": 512 * 512},
        words=closed_vocabulary(),
    )[1]


SCENE = (Thing("circle", "red", (2, 2, 14, 14)), Thing("square", "red", (34, 34, 62, 62)))


def test_answers_match_whole_words_before_parts_of_words():
    assert answer_cells(page("ab cab x"), Turn("read", "What?", "ab")) == [{(0, 0)}, {(0, 1)}]
    assert answer_cells(page("(ab, cab"), Turn("read", "What?", "ab")) == [{(0, 1)}, {(0, 2)}]
    assert answer_cells(page("xab cab"), Turn("read", "What?", "ab")) == [{(0, 1), (1, 1)}, {(0, 2), (1, 2)}]


def test_each_character_points_to_its_printed_cell():
    cells = answer_cells(page("abcdxy"), Turn("read", "What?", "cd x"))
    assert cells == [{(0, 2)}, {(0, 3)}, {(1, 0)}, {(1, 0)}]


def test_repeated_text_points_to_both_and_frequent_text_to_none():
    assert answer_cells(page("abxab"), Turn("read", "What?", "ab")) == [{(0, 0), (0, 3)}, {(0, 1), (1, 0)}]
    assert answer_cells(page("1" * 6), Turn("read", "What?", "1")) == [frozenset()]


@pytest.mark.parametrize(
    ("task", "question", "answer", "expected"),
    [
        ("shape", "Which shape is at the top left?", "circle", {(0, 0)}),
        ("colour", "What colour is the square?", "red", {(2, 2), (2, 3), (3, 2), (3, 3)}),
        ("position", "Where is the red circle?", "top left", {(0, 0)}),
        ("count", "How many stars are there?", "0", {FIRST_POSITION}),
        ("ground", "Where is it?", "[0.50, 0.50, 0.97, 0.97]", {(2, 2), (2, 3), (3, 2), (3, 3)}),
    ],
)
def test_objects_are_found_by_shape_colour_position_and_box(task, question, answer, expected):
    cells = answer_cells(page(things=SCENE, kind="scene"), Turn(task, question, answer))
    assert cells == [expected] * len(answer)


def test_unprinted_values_point_to_the_label_in_the_question():
    cells = answer_cells(page("Jan Feb"), Turn("chart", "What is the value for Feb?", "40"))
    assert cells[0] == {(1, 0), (1, 1), (1, 2)}


def test_questions_mention_whole_words_in_any_case():
    assert mentioned_cells(page("DATE"), "What is the date?") == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert mentioned_cells(page("DAT"), "What is the date?") == frozenset()


def test_question_characters_point_to_printed_characters():
    printed, question = page("(Tea) tin"), "Is Tea tea?"
    whole, one = whole_word_cells(printed, question), spelled_cells(printed, question)
    assert whole[3:6] == [{(0, 1), (0, 2), (0, 3)}] * 3 == whole[7:10]
    assert one[3:6] == [{(0, 1)}, {(0, 2)}, {(0, 3)}] == one[7:10]
    assert not any(whole[:3] + one[:3])
    assert frozenset().union(*whole) == mentioned_cells(printed, question)


def test_counts_point_to_the_last_counted_object():
    turn = Turn("count", "How many?", "2", tuple(thing.box for thing in SCENE))
    assert answer_cells(page(things=SCENE, kind="scene"), turn) == [{(2, 2), (2, 3), (3, 2), (3, 3)}]
    cut = Sample(0, "scene", Image.new("RGB", (192, 64)), "", (), (), ())
    middle = PageCells(cut, crop(Size(64, 192), side=64), 16)
    assert answer_cells(middle, Turn("count", "How many?", "1", ((90, 20, 102, 44),))) == [{(2, 2)}]
    assert answer_cells(middle, Turn("count", "How many?", "1", ((2, 2, 14, 14),))) == [frozenset()]


def test_chart_values_point_to_their_label_or_bar():
    printed = page("70 70", things=(Thing("bar", "red", (32, 32, 48, 64)),))
    shown = printed.sample.glyphs[2].box
    assert answer_cells(printed, Turn("chart", "How much is X?", "70", (shown,))) == [{(0, 3)}, {(1, 0)}]
    bar = Turn("chart", "How much is X?", "70", (printed.sample.things[0].box,))
    assert answer_cells(printed, bar) == [{(2, 2), (3, 2)}] * 2


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<|user|>", "<image>", "▁Is", "▁", "t", "?", "<|assistant|>"], (2, 6, -1)),  # our tokenizer
        (
            ["ĠUSER", ":", "Ġ", "Ċ", "Is", "Ġt", "?", "ĠASSISTANT"],
            (4, 7, 0),
        ),  # a byte-level tokenizer; the first word follows a line break
        (["▁", "<0x0A>", "I", "s", "▁t", "?", "▁A"], (2, 6, 0)),
        (["▁Is", "▁t?!"], (0, 0, 0)),  # ends within a token
        (["▁Is", "▁x", "?"], (0, 0, 0)),
    ],
)
def test_question_tokens_are_found_for_all_tokenizers(pieces, expected):
    assert question_span(pieces, "Is t?") == expected


def test_scene_captions_point_to_one_object_after_the_other():
    caption = "2 objects: a red circle at the top left, a red square at the bottom right."
    cells = caption_cells(page(things=SCENE, kind="scene"), caption)
    assert len(cells) == len(caption)
    assert cells[caption.index("circle")] == {(0, 0)}
    assert cells[caption.index("square")] == {(2, 2), (2, 3), (3, 2), (3, 3)}


def test_caption_words_are_found_in_reading_order():
    cells = caption_cells(page("abcab"), "sign: ab c ab.")
    assert cells[6:8] == [{(0, 0)}, {(0, 1)}]
    assert cells[11:13] == [{(0, 3)}, {(1, 0)}]


@given(st.text("abc ", min_size=1, max_size=12))
def test_every_character_has_one_set_of_cells(text):
    printed = page("abcabc")
    assert len(caption_cells(printed, text)) == len(text)
    assert len(answer_cells(printed, Turn("read", "What?", text))) == len(text)


def test_tokens_have_the_cells_of_all_their_characters():
    cells = [frozenset({(0, column)}) for column in range(4)]
    assert token_cells(["▁ab", "c", "d"], cells) == [{(0, 0), (0, 1)}, {(0, 2)}, {(0, 3)}]


def test_answer_spans_are_the_runs_of_labels():
    assert answer_spans(torch.tensor([-100, 5, 6, -100, -100, 7])) == [(1, 3), (5, 6)]


def test_answer_targets_point_to_the_visual_tokens_of_the_answer():
    processor = small_processor()
    world = World(size=256, kinds={"scene": 1})
    dataset = ChatDataset(world, processor, 8, captions=1.0, attention_targets=True)
    for index in range(8):
        item, sample = dataset[index], world.sample(index)
        turns = dataset.turns(sample)
        first = int((item["input_ids"] == processor.image_token_id).nonzero()[0, 0])
        placement = processor.image_processor.placement(Size(sample.image.height, sample.image.width))
        cells = PageCells(sample, placement, 64)
        for turn, (start, _) in zip(turns, answer_spans(item["labels"]), strict=True):
            if turn.task in ("shape", "colour"):
                found = {target for position, target in item["answer_targets"].tolist() if position == start - 1}
                named = answer_cells(cells, turn)[0]
                assert found == {first + row * (cells.grid.width + 1) + column for row, column in named} != set()
        seen = item["answer_targets"][:, 1]  # 0, the first position, if there is no target
        assert (item["input_ids"][seen[seen > 0]] == processor.image_token_id).all()


def test_targets_follow_spelled_words_and_counted_objects():
    processor = small_processor()
    world = World(size=256, kinds={"receipt": 1, "scene": 3}, seed=1, turns=12)
    dataset = ChatDataset(world, processor, 9, captions=0.0, attention_targets=True)
    spelled = counted = 0
    for index in range(9):
        item, turns = dataset[index], dataset.turns(world.sample(index))
        text, supervised = processor.tokenizer.convert_ids_to_tokens(item["input_ids"].tolist()), item["labels"] != -100
        looks = item["answer_targets"].tolist()
        for position, _ in looks:
            if not supervised[position + 1]:
                assert text[position + 1] in string.ascii_letters
                spelled += 1
        for turn, (start, _) in zip(turns, answer_spans(item["labels"]), strict=True):
            if turn.task == "count":
                targets = [target for position, target in looks if position in (start - 1, start)]
                assert (targets == [0]) == (turn.answer == "0")
                assert turn.answer == "0" or {text[target] for target in targets} == {"<image>"}
                counted += 1
    assert min(spelled, counted) > 10


def test_targets_and_labels_follow_a_padded_image():
    wide = Sample(0, "scene", Image.new("RGB", (128, 64)), "", (), (), (Thing("star", "red", (96, 0, 128, 32)),))
    placement = square(Size(64, 128), side=128)
    assert PageCells(wide, placement, 32).objects([], []) == {(1, 3)}
    assert label_maps(wide, placement, 32)["shape"].nonzero().tolist() == [[1, 3]]
