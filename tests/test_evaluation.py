"""Metrics on cases computed by hand, and the benchmark with an answerer that knows everything or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convllava.evaluation import metrics
from convllava.evaluation.synthetic_report import evaluate
from convllava.geometry import parse_box, parse_boxes
from convllava.synthetic import World, box_text


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
def test_relaxed_match(answer, truth, right):
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
def test_intersection_over_union(a, b, value):
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


def test_every_box_of_a_text_is_found():
    text = "One at [0.1, 0.2, 0.3, 0.4], one at [0.9,0.8,0.5,0.6]; [1, 2] is none."
    assert list(parse_boxes(text)) == [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.9, 0.8)]
    assert parse_box(text) == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize("text", ["", "[1, 2, 3]", "[a, b, c, d]", "0.1, 0.2, 0.3, 0.4"])
def test_what_is_no_box_is_none(text):
    assert parse_box(text) is None
    assert not metrics.box_match(text, "[0.10, 0.10, 0.50, 0.50]")


class Oracle:
    """Knows the right answer to every question about a page, but only while that page is before it."""

    def __init__(self, world: World, count: int) -> None:
        pages = [world.sample(index) for index in range(count)]
        self.known = {(page.image.tobytes(), turn.question): turn.answer for page in pages for turn in page.turns}

    def encode(self, image):
        return image

    def answer_many(self, questions, batch_size):
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            yield [self.known.get((image.tobytes(), question), "none") for image, question in batch]


def test_benchmark_gives_full_marks_to_an_oracle_and_none_to_it_blind():
    world = World("heldout", seed=3, size=256)
    shares = []
    report = evaluate(Oracle(world, 12), world, 12, progress=shares.append)  # type: ignore[arg-type]
    assert report["overall"]["accuracy"] == 1.0
    assert report["overall"]["blind"] == 0.0
    assert report["overall"]["n"] == sum(score["n"] for score in report["tasks"].values()) > 30
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
