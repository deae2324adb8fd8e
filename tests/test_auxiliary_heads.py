"""Auxiliary heads: the numbers of the generated world, their label maps, and the heads that predict them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_synthetic_questions import parsed
from torch import Tensor
from training_runs import HEADS, SUPERVISED, TWO, logged, recipe, train, weights

from convllava.data.collate import collate
from convllava.data.position_labels import LABEL_CELL, POSITION_CLASSES, position_labels, value_class
from convllava.data.synthetic_chat import ChatDataset
from convllava.errors import InputError
from convllava.geometry import Size, unchanged
from convllava.model.part_names import parts_of
from convllava.synthetic import CHARACTERS, Glyph, Numbered, Sample, Thing, World
from convllava.synthetic.canvas import Canvas
from convllava.synthetic.questions import ORDINALS
from convllava.training import train as engine
from convllava.training.objectives.attention_supervision import (
    AttentionSupervision,
    enable_attention_supervision,
    supervised_layers,
)
from convllava.training.objectives.auxiliary_heads import (
    HEADS_FILE,
    AuxiliaryHeads,
    attach_heads,
    detach_heads,
)
from convllava.training.recipe import Data


def text_in(sample: Sample, piece: Numbered) -> str:
    """Return the text that is printed in a numbered piece."""
    x0, y0, x1, y1 = piece.box
    inside = [
        glyph.char
        for glyph in sample.glyphs
        if x0 <= glyph.box[0] <= glyph.box[2] <= x1 and y0 <= glyph.box[1] <= glyph.box[3] <= y1
    ]
    return "".join(inside).strip(".,()")


def answers_and_texts(sample: Sample) -> list[tuple[str, str]]:
    """Return the answer of each question that names a number, and the text of the pieces with that number."""
    found = []
    for turn in sample.turns:
        key, blanks = parsed(turn)
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


def test_numbers_of_a_page_match_its_questions(monkeypatch):
    monkeypatch.setattr("convllava.synthetic.world.degrade", lambda *args: None)  # boxes of turned words overlap
    for kinds in ("sign", "paragraph", "table"):
        world = World(size=512, kinds={kinds: 1}, turns=20, seed=3)
        pairs = [pair for index in range(20) for pair in answers_and_texts(world.sample(index))]
        assert len(pairs) >= 15
        assert [answer for answer, _ in pairs] == [read for _, read in pairs]


def test_count_answers_equal_the_label_of_the_last_object():
    world = World(size=512, turns=20, seed=4)
    names = {"words": "place", "all": "place", "bars": "place", "points": "place", "lines": "row", "rows": "row"}
    names |= {"shape": "of_shape", "colour": "of_colour"}
    seen = set()
    for sample in map(world.sample, range(60)):
        size = Size(sample.image.height, sample.image.width)
        maps = position_labels(sample, unchanged(size, stride=32), 32)
        for turn in (turn for turn in sample.turns if turn.task == "count" and turn.evidence):
            name = names[parsed(turn)[0].removeprefix("count.")]
            x0, y0, x1, y1 = (side / LABEL_CELL for side in turn.evidence[-1])
            found = maps[name][int((y0 + y1) / 2), int((x0 + x1) / 2)].item()
            assert found == min(int(turn.answer), POSITION_CLASSES[name] - 1)
            seen.add(parsed(turn)[0])
    assert len(seen) == len(names)


def test_chart_values_match_captions_and_answers():
    world = World(size=512, kinds={"bar_chart": 1, "line_chart": 1}, turns=20, seed=5)
    printed = 0
    for sample in map(world.sample, range(20)):
        values = {piece.place: piece.value for piece in sample.numbered if piece.value}
        values_in_caption = [int(part.split()[-1]) for part in sample.caption.rstrip(".").split(":")[1].split(", ")]
        assert list(values.values()) == values_in_caption
        letters = {glyph.box: glyph.char for glyph in sample.glyphs}
        things = [thing.box for thing in sample.things]
        for turn in (turn for turn in sample.turns if turn.evidence and turn.task == "chart"):
            for box in turn.evidence:
                if box in letters:
                    assert letters[box] == turn.answer[0]
                    printed += 1
                else:
                    assert values_in_caption[things.index(box)] == int(turn.answer)
    assert printed > 20


def test_numbers_follow_a_moved_object():
    canvas = Canvas(64, 64, (255, 255, 255))
    region = canvas.add_thing("star", "red", (2, 2, 10, 10))
    canvas.number(region, place=3)
    canvas.things[0] = dataclasses.replace(canvas.things[0], box=(4, 4, 12, 12))
    assert canvas.numbered() == (Numbered((4, 4, 12, 12), place=3),)


def test_position_labels_are_the_numbers_over_each_cell():
    things = tuple(
        Thing("star", colour, (32 * i, 32, 32 * i + 32, 64)) for i, colour in enumerate(("red", "blue", "red"))
    )
    pieces = (Numbered((0, 0, 32, 16), row=2, place=1), Numbered((32, 0, 64, 16), row=2, place=12, value=98))
    sample = Sample(0, "sign", Image.new("RGB", (128, 64)), "", (), (), things, pieces)
    found = position_labels(sample, unchanged(Size(64, 128), stride=32), 32)
    assert set(found) == {*POSITION_CLASSES, "boxes"}
    assert found["row"].shape == (64 // LABEL_CELL, 128 // LABEL_CELL)
    assert found["row"][0].tolist() == [2] * 4 + [0] * 4
    assert found["place"][0].tolist() == [1, 1, 9, 9] + [0] * 4  # there is no class beyond the last
    assert found["value"][0].tolist() == [0, 0, 20, 20] + [0] * 4
    assert found["of_shape"][2].tolist() == [1, 1, 2, 2, 3, 3, 0, 0]
    assert found["of_colour"][3].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert found["boxes"][:, 0].tolist() == [4, 5, 6]


def test_letter_labels_count_within_words():
    places = [*range(0, 16 * 14, 16), 16 * 16]
    text = "fourteenletter" + "a"
    glyphs = tuple(Glyph(char, (x, 32, x + 16, 64), begins=x in (0, 256)) for char, x in zip(text, places, strict=True))
    sample = Sample(0, "sign", Image.new("RGB", (288, 64)), "", (), glyphs, ())
    size = unchanged(Size(64, 288), stride=32)
    found = position_labels(sample, size, 32, character_labels=True)
    assert found["letter"][2].tolist() == [*range(1, 13), 12, 12, 0, 0, 1, 0]
    assert not found["letter"][:2].any()
    assert found["glyph"][5, ::2].tolist()[:14] == [CHARACTERS.index(char) + 1 for char in text[:14]]
    assert len(found["spelling"]) == len(text) + 2
    assert not {"glyph", "spelling"} & set(position_labels(sample, size, 32))


def test_chart_values_are_rounded_to_classes():
    assert [value_class(value) for value in (0, 1, 5, 8, 99, 100)] == [0, 1, 1, 2, 20, 20]


def batch_of(processor: Any, *samples: int, character_labels: bool = False) -> dict[str, Any]:
    world = World(size=256, kinds={"sign": 1}) if character_labels else World(size=128, simple=True)
    dataset = ChatDataset(
        world, processor, 8, attention_targets=True, position_labels=True, character_labels=character_labels
    )
    return collate([dataset[index] for index in samples], processor.tokenizer.pad_token_id)


def run_heads(model: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the outputs of the heads, and the input of the position heads."""
    targets = {kind: batch[f"{kind}_targets"] for kind in supervised_layers(model)}
    given: list[Tensor] = []
    hook = model.head.norm.register_forward_hook(lambda module, args, output: given.append(args[0]))
    pixels = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    supervision = AttentionSupervision(supervised_layers(model), targets, batch["position_labels"])
    outputs = model(**pixels, attention_supervision=supervision, output_hidden_states=True)
    hook.remove()
    return outputs["auxiliary"], given[0]


def with_heads(layers: int, separator: bool, character_labels: bool = False) -> tuple[Any, Any]:
    plan = recipe(HEADS)
    language = {**plan.model.language, "num_hidden_layers": layers}
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, language=language, row_separator=separator))
    model, processor = engine.initial_model(plan)
    enable_attention_supervision(model)
    attach_heads(model, character_labels=character_labels)
    return model, processor


@pytest.mark.parametrize(("layers", "separator"), [(1, True), (1, False), (2, True)])
def test_position_heads_read_the_mention_layer(layers, separator):
    model, processor = with_heads(layers, separator)
    batch = batch_of(processor, 0, 1)
    whole: list[Tensor] = []
    if layers > 1:
        model.model.language_model.layers[0].register_forward_hook(lambda module, args, output: whole.append(output))
    _, given = run_heads(model, batch)
    images = model.get_image_features(batch["pixel_values"]).pooler_output
    grids = [tuple(length // 4 for length in page["row"].shape) for page in batch["position_labels"]]
    assert [len(tokens) for tokens in images] == [rows * (columns + separator) for rows, columns in grids]
    if layers > 1:
        seen = batch["input_ids"] == model.config.image_token_id
        images = whole[0][seen].split([len(tokens) for tokens in images])
    content = [
        tokens.unflatten(0, (rows, columns + separator))[:, :columns].flatten(0, 1)
        for tokens, (rows, columns) in zip(images, grids, strict=True)
    ]
    torch.testing.assert_close(given, torch.cat(content), atol=1e-6, rtol=1e-5)


def test_batched_head_inputs_equal_single():
    model, processor = with_heads(2, True)
    together = run_heads(model, batch_of(processor, 0, 1, 2))[1]
    alone = [run_heads(model, batch_of(processor, index))[1] for index in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_character_heads_read_the_projector_output():
    model, processor = with_heads(2, True, character_labels=True)
    given: list[Tensor] = []
    model.head.characters.glyph.register_forward_hook(lambda module, args, output: given.append(args[0]))
    batch = batch_of(processor, 0, 1, character_labels=True)
    run_heads(model, batch)
    images = model.get_image_features(batch["pixel_values"]).pooler_output
    grids = [tuple(length // 4 for length in page["row"].shape) for page in batch["position_labels"]]
    content = [
        tokens.unflatten(0, (rows, columns + 1))[:, :columns].flatten(0, 1)
        for tokens, (rows, columns) in zip(images, grids, strict=True)
    ]
    torch.testing.assert_close(given[0], torch.cat(content), atol=1e-6, rtol=1e-5)


def test_new_heads_give_the_model_no_gradient():
    model, processor = with_heads(2, True, character_labels=True)
    found, _ = run_heads(model, batch_of(processor, 0, 1, character_labels=True))
    (found["loss"] + found["character_loss"]).backward()
    touched = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {"head.maps.row.weight", "head.characters.glyph.weight", "head.characters.next.weight"} <= touched
    assert all(name.startswith("head.") for name in touched)
    detach_heads(model)
    assert "head" not in parts_of(model)


def test_heads_learn_the_labels_of_a_batch():
    model, processor = with_heads(2, True, character_labels=True)
    batch = batch_of(processor, 0, 1, character_labels=True)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.02)
    found = []
    for _ in range(40):
        found.append(run_heads(model, batch)[0])
        optimizer.zero_grad()
        (found[-1]["loss"] + found[-1]["character_loss"]).backward()
        optimizer.step()
    assert found[-1]["loss"] < 0.3 * found[0]["loss"]
    for name in ("row", "place", "letter", "glyph", "spelling"):
        assert found[-1][name] > 0.9 > 0.5 > found[0][name], name


def test_head_accuracies_are_logged_and_heads_not_in_the_model(tmp_path, monkeypatch):
    outputs: list[dict[str, Tensor]] = []
    forward = AuxiliaryHeads.forward
    monkeypatch.setattr(AuxiliaryHeads, "forward", lambda *args: outputs.append(forward(*args)) or outputs[-1])
    last = engine.train(recipe(dataclasses.replace(HEADS, data=Data(size=256, kinds={"sign": 1}))), tmp_path)
    assert len(outputs) == HEADS.steps
    for name in ("row", "letter", "box_error", "glyph", "spelling"):
        assert logged(tmp_path, name) == [pytest.approx(found[name].item(), abs=1e-4) for found in outputs]
    assert not any("head." in name and "lm_head" not in name for name in load_file(last / "model.safetensors"))


def test_heads_start_from_the_heads_of_the_previous_stage(tmp_path):
    still = dict.fromkeys(HEADS.learning_rates, 0.0)
    without = dataclasses.replace(HEADS, name="without", character_label_weight=0.0, learning_rates=still, steps=1)
    last = engine.train(
        recipe(HEADS, without, dataclasses.replace(without, name="again", character_label_weight=0.5)), tmp_path
    )
    first, *later = [load_file(tmp_path / name / HEADS_FILE) for name in ("0-heads", "1-without", "2-again")]
    assert first["maps.row.weight"].any()
    assert first["characters.glyph.weight"].any()
    for heads in later:
        torch.testing.assert_close(heads, first, atol=0, rtol=0)
    assert [path.name for path in last.glob("*.safetensors")] == ["model.safetensors"]  # vLLM reads them all


def test_heads_with_other_shapes_or_damaged_are_rejected(tmp_path):
    engine.train(recipe(HEADS), tmp_path)
    file = tmp_path / "0-heads" / HEADS_FILE
    model, _ = with_heads(1, True)
    detach_heads(model)
    save_file({**load_file(file), "box.weight": torch.zeros(4, 3)}, file)
    with pytest.raises(InputError, match=r"box\.weight has another shape"):
        attach_heads(model, file.parent.parent)
    file.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="not a readable file of tensors"):
        attach_heads(model, file.parent.parent)


def test_two_processes_train_heads_like_two_micro_batches_of_one(tmp_path):
    stage = dataclasses.replace(HEADS, steps=2)
    train(recipe(stage), tmp_path / "two", TWO)
    train(recipe(dataclasses.replace(stage, gradient_accumulation_steps=2)), tmp_path / "one")
    two, one = weights(tmp_path / "two/0-heads"), weights(tmp_path / "one/0-heads")
    for name in two:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position_label_weight": -1.0}, "position_label_weight must be 0 or more"),
        ({"character_label_weight": -1.0}, "character_label_weight must be 0 or more"),
        (
            {
                "character_label_weight": 0.5,
                "position_label_weight": 0.0,
                "learning_rates": dict(SUPERVISED.learning_rates),
            },
            "character_label_weight needs position_label_weight",
        ),
        ({"learning_rates": {"language_model": 1e-3, "head": 1e-3}}, "needs a learning rate of the projector"),
        ({"position_label_weight": 0.5, "attention_supervision": 0.0}, "needs attention_supervision"),
        ({"position_label_weight": 0.5, "learning_rates": dict(SUPERVISED.learning_rates)}, "such as head: 1.0e-3"),
        ({"position_label_weight": 0.0}, "only position_label_weight has a head"),
    ],
)
def test_invalid_label_settings_are_rejected(settings, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(HEADS, **settings)
