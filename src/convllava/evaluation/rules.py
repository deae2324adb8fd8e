"""Rules that grade one answer to one question, one for each kind of benchmark.

A rule takes the question, the answer and a `GradingContext`, and returns a `Grade`. The metrics and parsers that it
calls name the sources.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from convllava.evaluation import answer_parsing, metrics
from convllava.evaluation.questions import Question
from convllava.geometry import Placement, Size, parse_box


class Grade(NamedTuple):
    """The score of an answer, 0 to 1, and the value that was read from it; None if it could not be read."""

    score: float
    parsed: str | None


LLMJudge = Callable[[str, str, str], float | None]
"""Question, truth, answer -> a score from 0 to 1, or None if the LLM judge gave none."""


@dataclass(frozen=True)
class GradingContext:
    """Further input of some rules, in addition to the question and the answer.

    Attributes:
        placement: Maps an image size to its placement on the canvas, if boxes are fractions of the canvas; None if they
            are fractions of the image.
        llm_judge: Grades free answers.
    """

    placement: Callable[[Size], Placement] | None = None
    llm_judge: LLMJudge | None = None


Rule = Callable[[Question, str, GradingContext], Grade]


def _by_reading(parse: Callable[[Question, str], str | None]) -> Rule:
    """Return a rule: the value that `parse` reads from the answer must be one of the truths."""

    def rule(question: Question, answer: str, context: GradingContext) -> Grade:
        found = parse(question, answer)
        return Grade(float(found is not None and found in question.truths), found)

    return rule


def _by_metric(metric: Callable[[Question, str], float]) -> Rule:
    """Return the rule that scores the whole answer by a metric."""

    def rule(question: Question, answer: str, context: GradingContext) -> Grade:
        return Grade(float(metric(question, answer)), answer.strip() or None)

    return rule


by_choice = _by_reading(lambda question, answer: answer_parsing.choice(answer, question.options, question.letters))
"""Multiple choice: the letter (`answer_parsing.choice`)."""
by_start = _by_reading(lambda question, answer: answer_parsing.yes_or_no_at_start(answer))
"""MME: yes or no at the start of the answer."""
by_sentence = _by_reading(lambda question, answer: answer_parsing.yes_or_no_in_sentence(answer))
"""POPE: yes or no in the first sentence."""
by_vqa = _by_metric(lambda question, answer: metrics.vqa_accuracy(answer, question.truths))
"""TextVQA: VQA accuracy."""
by_anls = _by_metric(lambda question, answer: metrics.anls(answer, question.truths))
"""DocVQA and InfographicVQA: ANLS."""
by_chart = _by_metric(lambda question, answer: any(metrics.chart_match(answer, truth) for truth in question.truths))
"""ChartQA: a number within 5 %, or the same text."""
by_containment = _by_metric(
    lambda question, answer: metrics.contains(answer, question.truths, is_formula=question.details["is_formula"])
)
"""OCRBench: the answer contains the truth."""
by_task = _by_metric(lambda question, answer: matches_task(question.details["task"], answer, question.truths[0]))
"""Generated pages: exact match; chart values within 5 %; boxes with IoU >= 0.5."""


def by_choice_or_text(question: Question, answer: str, context: GradingContext) -> Grade:
    """RealWorldQA: the letter if there are options, else the same text, ignoring case and a final full stop."""
    options = question.options or question.details.get("written", ())
    if options:
        found = answer_parsing.choice(answer, options, string.ascii_uppercase[: len(options)])
        return Grade(float(found == question.truths[0].upper()), found)
    text = answer.strip().rstrip(".").lower()
    return Grade(float(text in {truth.lower() for truth in question.truths}), text or None)


def by_mmmu(question: Question, answer: str, context: GradingContext) -> Grade:
    """MMMU: the letter of a choice, or the possible meanings of an open answer."""
    if question.options:
        found = answer_parsing.mmmu_choice(answer, question)
        return Grade(float(found in question.truths), found)
    is_right = answer_parsing.mmmu_open_match(answer_parsing.mmmu_open(answer), question.truths)
    return Grade(float(is_right), answer.strip() or None)


def by_box(question: Question, answer: str, context: GradingContext) -> Grade:
    """RefCOCO: IoU of at least 0.5 in pixels of the image. The answer's fractions are converted to these pixels.

    Source: arXiv 1608.00272 (RefCOCO) for the data; accuracy at IoU 0.5 as in MDETR (arXiv 2104.12763), table 2.

    Raises:
        InputError: if the row does not have the size of the image, and the image cannot be read.
    """
    fractions = parse_box(answer)
    if fractions is None:
        return Grade(0.0, None)
    if question.details["size"] is not None:
        height, width = question.details["size"]
        size = Size(int(height), int(width))
    else:
        image = question.pictures[0].load()
        size = Size(image.height, image.width)
    if context.placement is not None:
        box = context.placement(size).box_from_normalised(fractions)
    else:
        x0, y0, x1, y1 = fractions
        box = (x0 * size.width, y0 * size.height, x1 * size.width, y1 * size.height)
    shared = metrics.intersection_over_union(box, question.details["box"])
    return Grade(float(shared >= 0.5), "[" + ", ".join(f"{value:.1f}" for value in box) + "]")


def by_llm_judge(question: Question, answer: str, context: GradingContext) -> Grade:
    """MM-Vet: the score that the LLM judge gives, 0 to 1 (`llm_judge`)."""
    assert context.llm_judge is not None  # `results.score_answers` has checked it
    score = context.llm_judge(question.text, question.truths[0], answer)
    return Grade(score or 0.0, None if score is None else f"{score:g}")


def matches_task(task: str, answer: str, truth: str) -> bool:
    """Return whether an answer to a generated question of a task is right (`by_task`)."""
    matchers: dict[str, Callable[[str, str], bool]] = {"chart": metrics.relaxed_match, "ground": metrics.box_match}
    return matchers.get(task, metrics.exact_match)(answer, truth)
