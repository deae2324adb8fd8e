"""Published scoring rules on cases computed by hand, and their properties for any text."""

from __future__ import annotations

import pytest
from benchmark_files import patient
from hypothesis import given
from hypothesis import strategies as st

from convllava.evaluation import answer_parsing, metrics
from convllava.evaluation.metrics import normalise
from convllava.evaluation.questions import MissingPicture, Question
from convllava.geometry import parse_box, parse_boxes
from convllava.synthetic import box_text

texts = st.text(max_size=30)
OPTIONS = ("a dog", "a cat", "two cats", "none of them")


def choice_question(options: tuple[str, ...] = OPTIONS) -> Question:
    return Question("1", "What is it?", (MissingPicture("none"),), ("A",), options)


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
def test_normalisation_equals_the_textvqa_challenge(text, normalised):
    assert normalise(text) == normalised


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_of_ten_answers_out(agreeing, score):
    truths = ["stop"] * agreeing + [f"other{number}" for number in range(10 - agreeing)]
    assert metrics.vqa_accuracy("Stop.", truths) == pytest.approx(score)


@patient
@given(texts, st.lists(texts, min_size=10, max_size=10))
def test_vqa_accuracy_never_falls_with_one_more_agreement(answer, truths):
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
def test_anls_keeps_one_half_and_drops_lower_similarities(answer, truths, score):
    assert metrics.anls(answer, truths) == pytest.approx(score)


@patient
@given(texts, texts)
def test_similarity_is_symmetric_bounded_and_one_for_equal_texts(a, b):
    assert metrics.similarity(a, b) == pytest.approx(metrics.similarity(b, a))
    assert 0 <= metrics.similarity(a, b) <= 1
    assert metrics.similarity(a, a) == 1


def similarity_by_definition(a, b):
    a, b = " ".join(a.lower().split()), " ".join(b.lower().split())
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row, above = [i], row
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return 1 - row[-1] / max(len(a), len(b)) if a or b else 1.0


@patient
@given(texts, texts)
def test_similarity_equals_its_definition(a, b):
    assert metrics.similarity(a, b) == similarity_by_definition(a, b)


short = st.text("abB 1", max_size=8)


@patient
@given(short, short)
def test_similarity_of_similar_texts_equals_its_definition(a, b):
    assert metrics.similarity(a, b) == similarity_by_definition(a, b)


@patient
@given(texts, st.lists(texts, min_size=1, max_size=3), texts)
def test_one_more_right_answer_never_lowers_anls(answer, truths, more):
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
def test_chartqa_reads_percentages_as_numbers(answer, truth, right):
    assert metrics.chart_match(answer, truth) is right


@patient
@given(st.floats(1, 1e6), st.floats(0, 0.2))
def test_chartqa_tolerates_exactly_five_percent(target, share):
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
def test_ocrbench_accepts_answers_containing_the_truth(answer, truths, is_formula, right):
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
def test_choice_is_read_and_never_guessed(answer, letter):
    assert answer_parsing.choice(answer, OPTIONS, "ABCD") == letter


@patient
@given(texts, st.lists(texts, max_size=5))
def test_parsers_accept_any_text(answer, options):
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
def test_yes_and_no_follow_the_rules_of_mme_and_pope(answer, start, sentence):
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
def test_mmmu_choice_is_the_last_option_named(answer, letter):
    assert answer_parsing.mmmu_choice(answer, choice_question()) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("The answer is 4.567", "4.57", True),
        ("x = 1,234", "1234", True),
        ("So the result is 12 apples", "12", True),
        ("12", "13", False),
        ("it is photosynthesis", "Photosynthesis", True),
        ("it is photosynthesis in plants", "Photosynthesis", False),  # officially too: "is " counts as an introduction
        ("ab", "b", False),  # a single letter needs a space next to it
        ("1.5e3", "1500", True),
        ("", "1", False),
    ],
)
def test_mmmu_open_answers_match_by_number_or_contained_text(answer, truth, right):
    assert answer_parsing.mmmu_open_match(answer_parsing.mmmu_open(answer), [truth]) is right


def test_options_in_the_question_text_are_found_in_order():
    text = "Which way?\n\nA. Left\nB. Right.\n(C) On\nPlease answer directly."
    assert answer_parsing.written_options(text) == ("Left", "Right.", "On")
    assert answer_parsing.written_options("How many cars?") == ()


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("0", "0", True),
        ("1", "0", False),
        ("Mon", "Mon", True),
        ("Tue", "Mon", False),
        ("", "5", False),
        ("x5", "5", False),
        ("nan", "5", False),
    ],
)
def test_relaxed_match_tolerates_five_percent(answer, truth, right):
    assert metrics.relaxed_match(answer, truth) is right


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ((0, 0, 2, 2), (1, 0, 3, 2), 2 / 6),
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 1, 1), (2, 2, 3, 3), 0.0),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
        ((1, 1, 0, 0), (0, 0, 1, 1), 0.0),
    ],
)
def test_intersection_over_union_equals_hand_computed_values(a, b, value):
    assert metrics.intersection_over_union(a, b) == pytest.approx(value)


boxes = st.tuples(*[st.floats(0, 1)] * 4)


@given(boxes, boxes)
def test_intersection_over_union_is_symmetric_and_bounded(a, b):
    value = metrics.intersection_over_union(a, b)
    assert value == metrics.intersection_over_union(b, a)
    assert 0 <= value <= 1


@given(st.tuples(st.floats(0, 400), st.floats(0, 400), st.floats(20, 200), st.floats(20, 200)))
def test_box_text_is_parsed_back(corner_and_sides):
    x, y, width, height = corner_and_sides
    box = parse_box("It is at " + box_text((x, y, x + width, y + height), 640, 640) + ".")
    assert box is not None
    assert box == pytest.approx([min(v / 640, 0.99) for v in (x, y, x + width, y + height)], abs=0.0051)


def test_every_box_in_a_text_is_found():
    text = "One at [0.1, 0.2, 0.3, 0.4], one at [0.9,0.8,0.5,0.6]; [1, 2] is none."
    assert list(parse_boxes(text)) == [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.9, 0.8)]
    assert parse_box(text) == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize("text", ["", "[1, 2, 3]", "[a, b, c, d]", "0.1, 0.2, 0.3, 0.4"])
def test_text_without_a_box_is_none(text):
    assert parse_box(text) is None
    assert not metrics.box_match(text, "[0.10, 0.10, 0.50, 0.50]")
