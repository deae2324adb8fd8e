"""Scores of answers equal arithmetic on the logits; batched equals single; only the model's own answer is greedy."""

from __future__ import annotations

import pytest
import torch
from conftest import picture

from convllava import InputError, load
from convllava.inference import Assistant
from convllava.inference.likelihood import log_likelihoods
from convllava.synthetic import World

QUESTION = [{"role": "user", "content": "what is red?"}]


@pytest.fixture(scope="module")
def assistant(parts):
    return Assistant(*parts)


def requests_of_all_kinds():
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}, {"type": "image"}]}]
    later = [*QUESTION, {"role": "assistant", "content": "the total"}, {"role": "user", "content": "is"}]
    return [
        ([picture(64, 64, 1)], QUESTION, "the total is top left"),
        ([picture(130, 64, 2), picture(64, 192, 3)], two, "x"),
        ([], QUESTION, "red"),
        ([picture(64, 256, 4)], later, "15.30"),
    ]


def by_hand(assistant, images, text, answer):
    """Sum the log probabilities of an answer's tokens in one forward pass."""
    inputs = assistant.processor(images=images, text=text + answer, return_tensors="pt", padding=True)
    prompt = assistant.processor(images=images, text=text, return_tensors="pt", padding=True)["input_ids"].shape[1]
    with torch.no_grad():
        logits = assistant.model(**inputs).logits
    scores = logits[0, prompt - 1 : -1].log_softmax(-1)
    return scores.gather(-1, inputs["input_ids"][0, prompt:, None]).sum().item()


def test_score_equals_the_sum_over_answer_and_end_of_turn(assistant):
    image = picture(70, 200)
    found = log_likelihoods(assistant, [([image], QUESTION, "top left 7")])[0].total
    expected = by_hand(assistant, [image], "<|user|><image> what is red?<|assistant|>", " top left 7<|end|>")
    assert found == pytest.approx(expected, abs=1e-4)


def test_batched_scores_equal_single(assistant):
    requests = requests_of_all_kinds()
    batched = log_likelihoods(assistant, requests)
    single = [log_likelihoods(assistant, [request])[0] for request in requests]
    assert [score.total for score in batched] == pytest.approx([score.total for score in single], abs=1e-3)
    assert len({round(score.total, 2) for score in batched}) == len(requests)


def test_only_the_models_own_answer_is_greedy():
    assistant = load("tiny", device="cpu")
    page = World("heldout", seed=1, size=256, kinds={"scene": 1}).sample(0)
    questions = [turn.question for turn in page.turns[:3]]
    said = [assistant.ask(page.image, question) for question in questions]
    requests = [
        ([page.image], [{"role": "user", "content": question}], answer)
        for question, own in zip(questions, said, strict=True)
        for answer in (own, "seven")
    ]
    scores = log_likelihoods(assistant, requests)
    assert [score.is_greedy for score in scores] == [True, False] * 3
    assert all(own.total > other.total for own, other in zip(scores[::2], scores[1::2], strict=True))


def test_prefix_of_the_models_own_answer_is_not_greedy():
    assistant = load("tiny", device="cpu")
    page = World("heldout", seed=1, size=256).sample(0).image
    said = assistant.ask(page, "Read the page.")
    beginning = said[:-1]  # printed text is spelled out, so this is one token less
    question = [{"role": "user", "content": "Read the page."}]
    scores = log_likelihoods(assistant, [([page], question, said), ([page], question, beginning)])
    assert [score.is_greedy for score in scores] == [True, False]


def test_encoded_image_scores_like_the_image(assistant):
    image = picture(64, 128)
    encoded = assistant.encode(image)
    scores = log_likelihoods(assistant, [([image], QUESTION, "red"), ([encoded], QUESTION, "red")])
    assert scores[0].total == pytest.approx(scores[1].total, abs=1e-4)


def test_long_prompt_and_a_long_answer_fit_in_one_batch(assistant):
    long = [{"role": "user", "content": "what " * 240}]
    requests = [([], long, "red"), ([], QUESTION, "red " * 150)]
    batched = log_likelihoods(assistant, requests)
    single = [log_likelihoods(assistant, [request])[0] for request in requests]
    assert [score.total for score in batched] == pytest.approx([score.total for score in single], rel=1e-4)


def test_no_requests_give_no_scores(assistant):
    assert log_likelihoods(assistant, []) == []


def test_bad_requests_are_rejected(assistant):
    with pytest.raises(InputError, match="literal mark <image>"):
        log_likelihoods(assistant, [([], QUESTION, "an <image>")])
    with pytest.raises(InputError, match="the context is 512"):
        log_likelihoods(assistant, [([], QUESTION, "what " * 600)])
