"""Scores of questions as the numbers that benchmarks report. Shares are 0 to 1; MME's sums are its points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from convllava.evaluation.columns import MME_COGNITION, MME_PERCEPTION


@dataclass(frozen=True)
class Judged:
    """A question with its verdict.

    Attributes:
        id, categories, group: Of the question.
        truth: Its first right answer.
        score: 0 to 1.
        parsed: What was read in the answer; None where nothing was.
    """

    id: str
    categories: tuple[str, ...]
    group: str
    truth: str
    score: float
    parsed: str | None


Groups = Sequence[Sequence[Judged]]
"""Questions that are judged together, a group each; most are alone in theirs."""


def groups_of(judged: Iterable[Judged]) -> list[list[Judged]]:
    """Questions that share a group together, each other one alone; in the order of their first questions."""
    groups: dict[tuple[bool, str], list[Judged]] = defaultdict(list)
    for item in judged:
        groups[bool(item.group), item.group or item.id].append(item)
    return list(groups.values())


def mean(groups: Groups) -> dict[str, float]:
    """The mean score of all questions."""
    return {"accuracy": _mean(item.score for item in _flat(groups))}


def anls(groups: Groups) -> dict[str, float]:
    """The mean similarity of all questions."""
    return {"anls": _mean(item.score for item in _flat(groups))}


def points(groups: Groups) -> dict[str, float]:
    """OCRBench: the share that is right, and how many, which of its 1000 questions is the final score."""
    return mean(groups) | {"points": sum(item.score for item in _flat(groups))}


def circular(groups: Groups) -> dict[str, float]:
    """MMBench: a question is right when all its rotations are; beside it the share of the unrotated ones.

    The file brings the rotations; without any, both numbers are the same.

    Source: CircularEval of arXiv 2307.06281, section 4.2.
    """
    return {
        "circular": _mean(min(item.score for item in group) for group in groups),
        "vanilla": _mean(_unrotated(group).score for group in groups),
        "rotations": _mean(float(len(group)) for group in groups),
    }


def seen_and_blind(groups: Groups) -> dict[str, float]:
    """The generated world: the share right, and the share right of the same questions about another page's image.

    Groups hold a question under the group's name, and the same asked blind.
    """
    blind = [item for group in groups for item in group if item.id != item.group]
    return {
        "accuracy": _mean(_unrotated(group).score for group in groups),
        "blind": _mean(item.score for item in blind),
    }


def each(groups: Groups) -> list[Judged]:
    """Every question is a unit of comparisons."""
    return _flat(groups)


def worst(groups: Groups) -> list[Judged]:
    """A question and its rotations are one unit, as good as the worst of them."""
    return [replace(_unrotated(group), score=min(item.score for item in group)) for group in groups]


def seen(groups: Groups) -> list[Judged]:
    """Questions are units, without those asked blind."""
    return [_unrotated(group) for group in groups]


def _unrotated(group: Sequence[Judged]) -> Judged:
    return next((item for item in group if item.id == item.group), group[0])


def mme(groups: Groups) -> dict[str, float]:
    """MME: accuracy per question, accuracy+ per image with both its questions right, and their sums in points.

    A subtask gives 100 * (accuracy + accuracy+); perception is the sum of ten, cognition of four, total of both. An
    image that has not two questions here, as in a part of the file, is not right as a pair.

    Source: arXiv 2306.13394, section 2.2, and its `calculation.py`.
    """
    by_task: dict[str, list[Sequence[Judged]]] = defaultdict(list)
    for group in groups:
        by_task[group[0].categories[0]].append(group)
    gained = {task: 100 * sum(_accuracies(pairs)) for task, pairs in by_task.items()}
    perception = sum(gained.get(task, 0.0) for task in MME_PERCEPTION)
    cognition = sum(gained.get(task, 0.0) for task in MME_COGNITION)
    accuracy, plus = _accuracies(groups)
    return {
        "total": perception + cognition,
        "perception": perception,
        "cognition": cognition,
        "accuracy": accuracy,
        "accuracy_plus": plus,
    }


def _accuracies(pairs: Groups) -> tuple[float, float]:
    both = [float(len(pair) == 2 and all(item.score == 1 for item in pair)) for pair in pairs]
    return _mean(item.score for item in _flat(pairs)), _mean(both)


def yes_or_no(groups: Groups) -> dict[str, float]:
    """POPE, with yes as the positive answer. An answer that is neither is wrong and counts as no yes.

    Source: arXiv 2305.10355, section 4.1, and its `evaluate.py`.
    """
    judged = _flat(groups)
    said = sum(item.parsed == "yes" for item in judged)
    meant = sum(item.truth == "yes" for item in judged)
    both = sum(item.parsed == item.truth == "yes" for item in judged)
    precision, recall = both / said if said else 0.0, both / meant if meant else 0.0
    return {
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "accuracy": _mean(item.score for item in judged),
        "precision": precision,
        "recall": recall,
        "yes_ratio": said / len(judged) if judged else 0.0,
    }


def _flat(groups: Groups) -> list[Judged]:
    return [item for group in groups for item in group]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
