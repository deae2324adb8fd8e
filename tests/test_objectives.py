"""Training objectives: the labels of page cells and visual tokens, and the weights of answers."""

from __future__ import annotations

import torch
from PIL import Image
from training_runs import ALIGN, CHAT, DENSE, recipe

from convllava.data.collate import IGNORE
from convllava.data.dense_labels import (
    GLYPH_CELL,
    DenseDataset,
    box_labels,
    label_maps,
    printed_words,
    spelling_labels,
    word_token_labels,
)
from convllava.data.synthetic_chat import ChatDataset
from convllava.geometry import Size, native, unchanged
from convllava.synthetic import CHARACTERS, Glyph, Sample, Thing, World
from convllava.training import train as engine
from convllava.training.initialise import calibrate
from convllava.training.objectives.alignment import Alignment, class_tokens
from convllava.training.objectives.losses import answer_loss, answer_weights, prompt_labels, prompt_loss


def test_label_maps_cover_the_boxes_of_the_page():
    glyphs = (Glyph("A", (0, 0, 16, 16)), Glyph("i", (33, 40, 36, 56)))
    things = (Thing("star", "red", (64, 0, 128, 32)),)
    sample = Sample(0, "sheet", World(size=128, simple=True).sample(0).image.resize((128, 64)), "", (), glyphs, things)
    labels = label_maps(sample, native(Size(64, 128), min_pixels=64 * 64, max_pixels=512 * 512), 32)
    expected = torch.zeros(64 // GLYPH_CELL, 128 // GLYPH_CELL, dtype=torch.long)
    expected[0:2, 0:2] = 1 + CHARACTERS.index("A")
    expected[6, 4] = 1 + CHARACTERS.index("i")
    assert labels["glyph"].equal(expected)
    assert (labels["shape"] > 0).tolist() == [[False, False, True, True], [False] * 4]
    assert labels["colour"].unique().tolist() == [0, 1]


def labelled_page() -> Sample:
    """Return a page of 64 x 64 pixels with "ab" and "c" on one line and "d" below."""
    boxes = {"a": (2, 2, 10, 12), "b": (11, 2, 20, 12), "c": (40, 2, 50, 12), "d": (2, 40, 10, 52)}
    glyphs = tuple(Glyph(char, box, begins=char != "b") for char, box in boxes.items())
    return Sample(0, "sign", Image.new("RGB", (64, 64)), "", (), glyphs, ())


def test_spelling_labels_hold_previous_characters_and_word_ends():
    printed = printed_words(labelled_page())
    assert ["".join(glyph.char for glyph in word) for word in printed] == ["ab", "c", "d"]
    found = spelling_labels(printed, unchanged(Size(64, 64), stride=32), 32)
    a, b, c, d = (CHARACTERS.index(char) + 1 for char in "abcd")
    assert found.tolist() == [
        *([0, 0, 0, a], [0, 0, a, b], [0, a, b, 0]),
        *([1, 0, 0, c], [1, 0, c, 0]),
        *([2, 0, 0, d], [2, 0, d, 0]),
    ]


def test_word_labels_are_the_words_of_one_token():
    _, processor = engine.initial_model(recipe(ALIGN))
    glyphs = tuple(Glyph(char, (2 + 9 * i, 2, 10 + 9 * i, 12)) for i, char in enumerate("Total:"))
    printed = printed_words(Sample(0, "sign", Image.new("RGB", (64, 64)), "", (), glyphs, ()))
    found = word_token_labels(printed, unchanged(Size(64, 64), stride=32), 32, processor.tokenizer)
    ids = [processor.tokenizer(text).input_ids[0] for text in (" Total", " total")]
    assert sorted(found.tolist()) == sorted([cell, name] for cell in (0, 1) for name in ids)
    assert not len(
        word_token_labels(printed_words(labelled_page()), unchanged(Size(64, 64), stride=32), 32, processor.tokenizer)
    )


def test_box_labels_are_distances_from_the_cell_centre():
    found = box_labels([(8, 0, 40, 32), (48, 48, 64, 64)], unchanged(Size(64, 64), stride=32), 32)
    expected = [[0, -0.25, -0.5, 0.75, 0.5], [3, 0.0, 0.0, 0.5, 0.5]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_dense_items_have_the_size_of_the_grids():
    _, processor = engine.initial_model(recipe(DENSE))
    for index in range(3):
        item = DenseDataset(World(size=128, simple=True), processor, 3, sheets=0.5)[index]
        height, width = item["pixel_values"].shape[1:]
        assert item["glyph"].shape == (height // 8, width // 8)
        assert item["shape"].shape == item["colour"].shape == (height // 32, width // 32)


def test_alignment_gives_all_names_of_a_cell_the_same_share():
    model, processor = engine.initial_model(recipe(ALIGN))
    alignment = Alignment(model, class_tokens(processor.tokenizer))
    circle, red, x, total = (processor.tokenizer(text).input_ids[0] for text in (" circle", " red", "x", " total"))
    embeddings = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    model.get_input_embeddings().weight.data = embeddings
    printed = torch.zeros(3 * alignment.side**2, dtype=torch.long)
    printed[alignment.side**2] = CHARACTERS.index("x") + 1
    drawn = [torch.tensor([[1, 0, 0]])]
    bags = alignment._names(printed, drawn, drawn, torch.tensor([[1, total]]))
    assert [row.nonzero().flatten().tolist() for row in bags] == [sorted([circle, red]), sorted([x, total]), []]
    tokens = 1000 * torch.stack([embeddings[circle], embeddings[x], embeddings[5]])
    log_shares = [torch.log_softmax(token @ embeddings.T, dim=-1) for token in tokens]
    halves = -(log_shares[0][[circle, red]].mean() + log_shares[1][[x, total]].mean())
    # The third cell is empty and has no loss.
    torch.testing.assert_close(alignment._naming_loss(tokens, bags), halves / 2)
    assert alignment._naming_loss(tokens, 0 * bags) == 0


def test_length_weighting_1_weights_answers_equally_0_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 5), torch.full((2, 6), IGNORE)
    labels[0, 1:3], labels[0, 4], labels[1, 2:] = torch.tensor([1, 2]), 3, torch.tensor([0, 1, 2, 3])
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    answers = [each[0, 0:2].mean(), each[0, 3], each[1, 1:].mean()]
    torch.testing.assert_close(answer_loss(logits, labels, answer_weights(labels, 1.0)), torch.stack(answers).mean())
    torch.testing.assert_close(answer_loss(logits, labels, answer_weights(labels, 0.0)), each.sum() / 7)


def test_calibrated_tokens_have_mean_zero_and_unit_size():
    model, processor = engine.initial_model(recipe(CHAT))
    world = World(size=128, simple=True)
    dataset = ChatDataset(world, processor, 4)
    images = [dataset[index]["pixel_values"][0] for index in range(4)]
    calibrate(model, images)
    projector = model.model.multi_modal_projector
    features = model.model.vision_tower(images).last_hidden_state
    tokens = projector.linear_2(projector.act(projector.linear_1(features)))
    torch.testing.assert_close(tokens.mean(0), torch.zeros(tokens.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.square().mean().sqrt(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_prompt_labels_exclude_answers_images_and_padding():
    ids = torch.tensor([[1, 9, 9, 4, 5, 6, 0], [1, 9, 7, 8, 5, 0, 0]])
    answers = torch.full_like(ids, -100)
    answers[:, 4] = 5
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]])
    labels = prompt_labels(ids, answers, 9, mask)
    assert labels.tolist() == [[1, -100, -100, 4, -100, 6, -100], [1, -100, 7, 8, -100, -100, -100]]
    packed = prompt_labels(ids[:1], answers[:1], 9, None, torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    assert packed.tolist() == [[-100, -100, -100, -100, -100, 6, 0]]


def test_prompt_loss_is_a_mean_over_prompts_and_zero_without_any():
    logits, labels = torch.randn(2, 4, 7), torch.full((2, 4), -100)
    assert prompt_loss(logits, labels).item() == 0.0
    labels[0, 0] = 5  # no logits predict the first token
    labels[0, 2], labels[1, 3] = 4, 6
    expected = -(logits[0, 1].log_softmax(-1)[4] + logits[1, 2].log_softmax(-1)[6]) / 2
    torch.testing.assert_close(prompt_loss(logits, labels), expected)
