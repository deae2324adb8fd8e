"""Published scoring rules on cases computed by hand, and what must hold of them for any text."""

from __future__ import annotations

import pytest
from benchmark_files import patient
from hypothesis import given
from hypothesis import strategies as st

from convllava.evaluation import answer_parsing, metrics
from convllava.evaluation.questions import NoPicture, Question
from convllava.evaluation.vqa_normalisation import normalise

texts = st.text(max_size=30)
OPTIONS = ("a dog", "a cat", "two cats", "none of them")


def choice_question(options: tuple[str, ...] = OPTIONS) -> Question:
    return Question("1", "What is it?", (NoPicture("none"),), ("A",), options)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("a 10-year-old", "10 year old"),
        ("well - done", "well done"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("Bob's", "bob 's"),
        ("yes!", "yes"),
        ("", ""),
    ],
)
def test_texts_are_normalised_as_the_textvqa_challenge_does(text, normalised):
    assert normalise(text) == normalised


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_of_ten_answers_out(agreeing, score):
    truths = ["stop"] * agreeing + [f"other{number}" for number in range(10 - agreeing)]
    assert metrics.vqa_accuracy("Stop.", truths) == pytest.approx(score)


@patient
@given(texts, st.lists(texts, min_size=10, max_size=10))
def test_vqa_accuracy_is_a_share_and_one_more_who_agrees_never_lowers_it(answer, truths):
    before = metrics.vqa_accuracy(answer, truths)
    assert 0 <= before <= 1
    assert metrics.vqa_accuracy(answer, [answer, *truths[1:]]) >= before - 1e-9


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("hello", ["hello"], 1.0),
        ("Hello  World ", ["hello world"], 1.0),
        ("helo", ["hello"], 0.8),
        ("ab", ["ac"], 0.5),  # exactly at the threshold: kept
        ("abc", ["axy"], 0.0),  # one third: cut
        ("", ["x"], 0.0),
        ("cat", ["dog", "cats"], 0.75),
    ],
)
def test_anls_keeps_one_half_and_cuts_what_is_below(answer, truths, score):
    assert metrics.anls(answer, truths) == pytest.approx(score)


@patient
@given(texts, texts)
def test_similarity_is_symmetric_and_bounded_and_one_for_equal_texts(a, b):
    assert metrics.similarity(a, b) == pytest.approx(metrics.similarity(b, a))
    assert 0 <= metrics.similarity(a, b) <= 1
    assert metrics.similarity(a, a) == 1


@patient
@given(texts, texts, texts)
def test_edit_distance_obeys_the_triangle(a, b, c):
    assert metrics.edit_distance(a, c) <= metrics.edit_distance(a, b) + metrics.edit_distance(b, c)
    assert metrics.edit_distance(a, b) >= abs(len(a) - len(b))


@patient
@given(texts, st.lists(texts, min_size=1, max_size=3), texts)
def test_another_truth_never_lowers_anls(answer, truths, more):
    assert metrics.anls(answer, [*truths, more]) >= metrics.anls(answer, truths)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("105", "100", True),
        ("94.9", "100", False),
        ("45%", "45%", True),
        ("45", "45%", False),
        ("0.45", "45%", True),
        ("46%", "45%", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("yes", "Yes", True),
        ("1,000", "1000", False),
        ("-5.1", "-5", True),
        ("", "5", False),
        ("nan", "5", False),
    ],
)
def test_chartqa_takes_percentages_as_numbers(answer, truth, right):
    assert metrics.chart_match(answer, truth) is right


@patient
@given(st.floats(1, 1e6), st.floats(0, 0.2))
def test_chartqa_tolerates_five_percent_and_no_more(target, share):
    right = metrics.chart_match(repr(target * (1 + share)), repr(target))
    if abs(share - 0.05) > 1e-6:
        assert right is (share < 0.05)


@pytest.mark.parametrize(
    ("answer", "truths", "is_formula", "right"),
    [
        ("It says HELLO world", ["hello"], False, True),
        ("hell", ["hello"], False, False),
        ("a\nb", ["A B"], False, True),
        ("\\frac { a } { B }", ["\\frac{a}{B}"], True, True),
        ("\\frac { a } { b }", ["\\frac{a}{B}"], True, False),
    ],
)
def test_ocrbench_looks_for_the_truth_in_the_answer(answer, truths, is_formula, right):
    assert metrics.contains(answer, truths, is_formula=is_formula) is right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**C**", "C"),
        ("B. a cat", "B"),
        ("A: a dog", "A"),
        ("D\nbecause it is", "D"),
        ("The answer is C.", "C"),
        ("The correct answer is (D), not (A).", "D"),
        ("Option B is right", "B"),
        ("I think it must be C", "C"),
        ("two cats", "C"),
        ("It shows a cat on a mat", "B"),
        ("A dog", "A"),
        ("", None),
        ("A or B", None),
        ("A, B", None),
        ("a dog and a cat", None),
        ("E", None),
        ("no idea", None),
        ("A bird", None),
    ],
)
def test_a_choice_is_read_or_left_unread_but_never_guessed(answer, letter):
    assert answer_parsing.choice(answer, OPTIONS, "ABCD") == letter


@patient
@given(texts, st.lists(texts, max_size=5))
def test_parsers_take_any_text(answer, options):
    question = choice_question(tuple(options))
    letters = question.letters
    assert answer_parsing.choice(answer, options, letters) in {None, *letters}
    assert answer_parsing.mmmu_choice(answer, question) in {None, *letters}
    assert answer_parsing.yes_or_no_at_start(answer) in {None, "yes", "no"}
    assert answer_parsing.yes_or_no_in_sentence(answer) in {None, "yes", "no"}
    answer_parsing.written_options(answer)
    answer_parsing.mmmu_open_match(answer_parsing.mmmu_open(answer), options)


@pytest.mark.parametrize(
    ("answer", "start", "sentence"),
    [
        ("Yes", "yes", "yes"),
        ("No, there is none", "no", "no"),
        ("yes.", "yes", "yes"),
        ("There is no dog", None, "no"),
        ("It is not there. Yes it is", None, "no"),
        ("I see a dog", None, None),
        ("", None, None),
        ("Yes, but no", "yes", "no"),
    ],
)
def test_yes_and_no_are_read_by_the_rules_of_mme_and_pope(answer, start, sentence):
    assert answer_parsing.yes_or_no_at_start(answer) == start
    assert answer_parsing.yes_or_no_in_sentence(answer) == sentence


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(A) or rather (C)", "C"),
        ("It is A at first but then B in the end", "B"),
        ("When one looks closely this is two cats", "C"),
        ("two cats", None),
        ("", None),
    ],
)
def test_mmmu_takes_the_last_option_that_is_named(answer, letter):
    assert answer_parsing.mmmu_choice(answer, choice_question()) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("The answer is 4.567", "4.57", True),
        ("x = 1,234", "1234", True),
        ("So the result is 12 apples", "12", True),
        ("12", "13", False),
        ("it is photosynthesis", "Photosynthesis", True),
        ("it is photosynthesis in plants", "Photosynthesis", False),  # officially too: "is " is taken for a lead
        ("ab", "b", False),  # a single letter needs a blank beside it
        ("1.5e3", "1500", True),
        ("", "1", False),
    ],
)
def test_mmmu_open_answers_are_numbers_to_two_places_or_contained_texts(answer, truth, right):
    assert answer_parsing.mmmu_open_match(answer_parsing.mmmu_open(answer), [truth]) is right


def test_options_written_in_a_question_are_found_in_order():
    text = "Which way?\n\nA. Left\nB. Right.\n(C) On\nPlease answer directly."
    assert answer_parsing.written_options(text) == ("Left", "Right.", "On")
    assert answer_parsing.written_options("How many cars?") == ()
