"""Numbers of lines, words, bars and things: the world's, their maps, and the heads that are asked for them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from test_synthetic_questions import understood
from training_runs import CHAT, GUIDED, MARKED, TWO, logged, recipe, train, weights

from convllava.data.conversation import collate
from convllava.data.marks import MARK_CELL, MARK_CLASSES, marks, step_of
from convllava.data.synthetic import ChatDataset
from convllava.errors import InputError
from convllava.geometry import Size, unchanged
from convllava.parts import parts_of
from convllava.synthetic import Numbered, Sample, Thing, World
from convllava.synthetic.canvas import Canvas
from convllava.synthetic.questions import ORDINALS, plural
from convllava.training import engine
from convllava.training.attention import Guidance, guide_attention, guided_layers
from convllava.training.marks import attach_heads, detach_heads


def text_in(sample: Sample, piece: Numbered) -> str:
    """What is printed in a numbered piece."""
    x0, y0, x1, y1 = piece.box
    inside = [
        glyph.char
        for glyph in sample.glyphs
        if x0 <= glyph.box[0] <= glyph.box[2] <= x1 and y0 <= glyph.box[1] <= glyph.box[3] <= y1
    ]
    return "".join(inside).strip(".,()")


def asked_for(sample: Sample) -> list[tuple[str, str]]:
    """For each question that names a number the answer, and what the pieces with that number say."""
    found = []
    for turn in sample.turns:
        key, blanks = understood(turn)
        row = int(
            blanks.get("number", ORDINALS.index(blanks["ordinal"]) + 1 if blanks.get("ordinal") in ORDINALS else 0)
        )
        if key == "read.line_word":
            words = [piece for piece in sample.numbered if piece.row == row]
            number = {"first": 0, "second": 1, "last": -1}[blanks["which"]]
            found.append((turn.answer, text_in(sample, words[number])))
            assert [piece.place for piece in words] == list(range(1, len(words) + 1))
        elif key == "read.sign_word":
            words = [piece for piece in sample.numbered if blanks["ordinal"] == "last" or piece.place == row]
            found.append((turn.answer, text_in(sample, words[-1])))
        elif key in ("read.line", "read.sign_line"):
            words = [text_in(sample, piece) for piece in sample.numbered if piece.row == row]
            found.append(("".join(turn.answer.split()).strip(".,()"), "".join(words)))
        elif key == "table.header":
            found.append(
                (turn.answer, *(text_in(sample, one) for one in sample.numbered if (one.row, one.place) == (0, row)))
            )
        elif key == "table.first":
            found.append(
                (turn.answer, *(text_in(sample, one) for one in sample.numbered if (one.row, one.place) == (row, 1)))
            )
    return found


def test_the_numbers_of_a_page_are_those_that_its_questions_mean():
    world = World(size=512, kinds={"sign": 1, "paragraph": 2, "table": 1}, turns=20, seed=3)
    pairs = [pair for index in range(40) for pair in asked_for(world.sample(index))]
    straight = [answer == read for answer, read in pairs]
    # On pages that are turned the box of a word may reach into the next line.
    assert sum(straight) > 0.9 * len(straight) > 90


def test_counts_are_the_numbers_of_the_last():
    world = World(size=512, turns=20, seed=4)
    seen = set()
    for sample in map(world.sample, range(60)):
        shapes: list[str] = [thing.shape for thing in sample.things]
        for turn in (turn for turn in sample.turns if turn.task == "count"):
            key, blanks = understood(turn)
            seen.add(key)
            if key == "count.lines" or key == "count.rows":
                assert max(piece.row for piece in sample.numbered) == int(turn.answer)
            elif key in ("count.words", "count.all", "count.bars", "count.points"):
                assert max(piece.place for piece in sample.numbered) == int(turn.answer)
            elif key == "count.shape":
                assert sum(plural(shape) == blanks["shapes"] for shape in shapes) == int(turn.answer)
    assert len(seen) == 8


def test_a_charts_pieces_have_the_values_that_it_shows():
    world = World(size=512, kinds={"bar_chart": 1, "line_chart": 1}, turns=20, seed=5)
    for sample in map(world.sample, range(10)):
        values = {piece.place: piece.value for piece in sample.numbered if piece.value}
        told = [int(part.split()[-1]) for part in sample.caption.rstrip(".").split(":")[1].split(", ")]
        assert list(values.values()) == told


def test_numbers_turn_with_the_page():
    canvas = Canvas(64, 64, (255, 255, 255))
    region = canvas.note("star", "red", (2, 2, 10, 10))
    canvas.number(region, place=3)
    canvas.things[0] = dataclasses.replace(canvas.things[0], box=(4, 4, 12, 12))
    assert canvas.numbered() == (Numbered((4, 4, 12, 12), place=3),)


def test_maps_tell_the_numbers_of_what_lies_over_each_cell():
    things = tuple(
        Thing("star", colour, (32 * i, 32, 32 * i + 32, 64)) for i, colour in enumerate(("red", "blue", "red"))
    )
    pieces = (Numbered((0, 0, 32, 16), row=2, place=1), Numbered((32, 0, 64, 16), row=2, place=12, value=98))
    sample = Sample(0, "sign", Image.new("RGB", (128, 64)), "", (), (), things, pieces)
    found = marks(sample, unchanged(Size(64, 128), stride=32), 32)
    assert set(found) == {*MARK_CLASSES, "mark_boxes"}
    assert found["row"].shape == (64 // MARK_CELL, 128 // MARK_CELL)
    assert found["row"][0].tolist() == [2] * 4 + [0] * 4
    assert found["place"][0].tolist() == [1, 1, 9, 9] + [0] * 4  # there is no class beyond the last
    assert found["value"][0].tolist() == [0, 0, 20, 20] + [0] * 4
    assert found["of_shape"][2].tolist() == [1, 1, 2, 2, 3, 3, 0, 0]
    assert found["of_colour"][3].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert found["mark_boxes"][:, 0].tolist() == [4, 5, 6]


def test_every_value_of_a_chart_has_a_class():
    assert [step_of(value) for value in (0, 1, 5, 8, 99, 100)] == [0, 1, 1, 2, 20, 20]


def marked_batch(processor, samples: int):
    dataset = ChatDataset(World(size=128, simple=True), processor, samples, guided=True, marked=True)
    return collate([dataset[index] for index in range(samples)], processor.tokenizer.pad_token_id)


def told(model, batch):
    guides = {kind: batch[f"{kind}_guides"] for kind in guided_layers(model)}
    guidance = Guidance(guided_layers(model), guides, {name: batch[name] for name in (*MARK_CLASSES, "mark_boxes")})
    pixels = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    return model(**pixels, guidance=guidance, output_hidden_states=True)["marks"]


@pytest.mark.parametrize("separator", [False, True])
def test_heads_of_a_batch_are_those_of_single_samples(separator):
    model, processor = engine.start(recipe(CHAT))
    if not separator:
        model.config.row_separator = processor.row_separator = False
        model.model.multi_modal_projector.row_separator = None
    guide_attention(model)
    attach_heads(model)
    torch.manual_seed(0)
    batch = marked_batch(processor, 3)
    together = told(model, batch)
    hidden = []
    model.head.maps["row"].register_forward_hook(lambda module, args, output: hidden.append(output))
    told(model, batch)
    for number in range(3):
        dataset = ChatDataset(World(size=128, simple=True), processor, 3, guided=True, marked=True)
        told(model, collate([dataset[number]], processor.tokenizer.pad_token_id))
    torch.testing.assert_close(hidden[0], torch.cat(hidden[1:]), atol=1e-4, rtol=1e-4)
    assert len(hidden[0]) == sum(len(item.flatten()) for item in batch["row"]) // model.head.side**2
    assert together["loss"].requires_grad
    detach_heads(model)
    assert "head" not in parts_of(model)


def test_a_marked_stage_logs_what_its_heads_tell_and_leaves_a_model_without_them(tmp_path):
    last = engine.train(recipe(MARKED), tmp_path)
    assert all(0 <= value <= 1 for value in logged(tmp_path, "of_colour"))
    assert len(logged(tmp_path, "loss")) == MARKED.steps
    assert not any("head." in name and "lm_head" not in name for name in weights(last))


def test_two_processes_learn_marks_as_two_passes_of_one(tmp_path):
    stage = dataclasses.replace(MARKED, steps=2)
    train(recipe(stage), tmp_path / "two", TWO)
    train(recipe(dataclasses.replace(stage, accumulate=2)), tmp_path / "one")
    two, one = weights(tmp_path / "two/0-marked"), weights(tmp_path / "one/0-marked")
    for name in two:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"marks": -1.0}, "marks is a weight of 0 or more"),
        ({"marks": 0.5, "guidance": 0.0}, "for stages with guidance"),
        ({"marks": 0.5, "trains": dict(GUIDED.trains)}, "such as head: 1.0e-3"),
    ],
)
def test_marks_that_cannot_be_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(MARKED, **settings)
