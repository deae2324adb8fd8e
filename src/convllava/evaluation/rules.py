"""What one answer to one question is worth: a rule for each kind of benchmark.

A rule takes the question, the answer and what it may need beside them, and gives a `Verdict`. The sources are those of
the metrics and parsers it calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from convllava.evaluation import answer_parsing, metrics
from convllava.evaluation.questions import Question
from convllava.geometry import Placement, Size, parse_box


class Verdict(NamedTuple):
    """The score of an answer, 0 to 1, and what was read in it; None where nothing could be read."""

    score: float
    parsed: str | None


Judge = Callable[[str, str, str], float | None]
"""Question, truth, answer -> a score from 0 to 1, or None where the judge gave none."""


@dataclass(frozen=True)
class Aids:
    """What some rules need beside question and answer.

    Attributes:
        placement: Where an image of a size lies in the canvas that boxes are fractions of; None: in all of it.
        judge: Scores free answers.
    """

    placement: Callable[[Size], Placement] | None = None
    judge: Judge | None = None


Rule = Callable[[Question, str, Aids], Verdict]


def by_choice(question: Question, answer: str, aids: Aids) -> Verdict:
    """The letter is right (`parsing.choice`)."""
    return _equal(answer_parsing.choice(answer, question.options, question.letters), question)


def by_choice_or_text(question: Question, answer: str, aids: Aids) -> Verdict:
    """RealWorldQA: the letter where there are options, else the same text but for case and a full stop at the end."""
    options = question.options or question.details.get("written", ())
    if options:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
        found = answer_parsing.choice(answer, options, letters)
        return Verdict(float(found == question.truths[0].upper()), found)
    found = answer.strip().rstrip(".").lower()
    return Verdict(float(found in {truth.lower() for truth in question.truths}), found or None)


def by_start(question: Question, answer: str, aids: Aids) -> Verdict:
    """MME: yes or no at the answer's start."""
    return _equal(answer_parsing.yes_or_no_at_start(answer), question)


def by_sentence(question: Question, answer: str, aids: Aids) -> Verdict:
    """POPE: yes or no in the first sentence."""
    return _equal(answer_parsing.yes_or_no_in_sentence(answer), question)


def by_vqa(question: Question, answer: str, aids: Aids) -> Verdict:
    return Verdict(metrics.vqa_accuracy(answer, question.truths), answer.strip() or None)


def by_anls(question: Question, answer: str, aids: Aids) -> Verdict:
    return Verdict(metrics.anls(answer, question.truths), answer.strip() or None)


def by_chart(question: Question, answer: str, aids: Aids) -> Verdict:
    right = any(metrics.chart_match(answer, truth) for truth in question.truths)
    return Verdict(float(right), answer.strip() or None)


def by_mmmu(question: Question, answer: str, aids: Aids) -> Verdict:
    """Choices by letter, open questions by what the answer may mean."""
    if question.options:
        return _equal(answer_parsing.mmmu_choice(answer, question), question)
    found = answer_parsing.mmmu_open(answer)
    return Verdict(float(answer_parsing.mmmu_open_match(found, question.truths)), answer.strip() or None)


def by_containment(question: Question, answer: str, aids: Aids) -> Verdict:
    right = metrics.contains(answer, question.truths, is_formula=question.details["is_formula"])
    return Verdict(float(right), answer.strip() or None)


def by_box(question: Question, answer: str, aids: Aids) -> Verdict:
    """RefCOCO: IoU of at least 0.5 in pixels of the image, to which the answer's fractions are mapped back.

    Source: arXiv 1608.00272 (RefCOCO) for the data; accuracy at IoU 0.5 as in MDETR (arXiv 2104.12763), table 2.

    Raises:
        InputError: the row does not say how large the image is, and the image cannot be read.
    """
    fractions = parse_box(answer)
    if fractions is None:
        return Verdict(0.0, None)
    size = _size(question)
    if aids.placement is not None:
        box = aids.placement(size).box_from_normalised(fractions)
    else:
        x0, y0, x1, y1 = fractions
        box = (x0 * size.width, y0 * size.height, x1 * size.width, y1 * size.height)
    shared = metrics.intersection_over_union(box, question.details["box"])
    return Verdict(float(shared >= 0.5), "[" + ", ".join(f"{value:.1f}" for value in box) + "]")


def by_judge(question: Question, answer: str, aids: Aids) -> Verdict:
    """MMVet: what the judge says, 0 to 1 (`judging`)."""
    assert aids.judge is not None  # refused before, see `scoring.judge`
    score = aids.judge(question.text, question.truths[0], answer)
    return Verdict(score or 0.0, None if score is None else f"{score:g}")


def _equal(found: str | None, question: Question) -> Verdict:
    return Verdict(float(found is not None and found in question.truths), found)


def _size(question: Question) -> Size:
    size = question.details["size"]
    if size is not None:
        return Size(int(size[0]), int(size[1]))
    image = question.pictures[0].load()
    return Size(image.height, image.width)
