"""From the scores of questions to the numbers that benchmarks report, and their bootstrap intervals.

Shares are 0 to 1; MME's sums are its points.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
RESAMPLES = 1000
LEVEL = 0.95
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Graded:
    """A question with its grade.

    Attributes:
        id, categories, group: From the question.
        truth: Its first right answer.
        score: 0 to 1.
        parsed: The value that was read from the answer; None if it could not be read.
    """

    id: str
    categories: tuple[str, ...]
    group: str
    truth: str
    score: float
    parsed: str | None


Groups = Sequence[Sequence[Graded]]
"""Questions that are scored together, one group each; most groups have one question."""


def groups_of(graded: Iterable[Graded]) -> list[list[Graded]]:
    """Put questions with the same group together, in the order of their first questions; others stay alone."""
    groups: dict[tuple[bool, str], list[Graded]] = defaultdict(list)
    for item in graded:
        groups[bool(item.group), item.group or item.id].append(item)
    return list(groups.values())


def mean(groups: Groups) -> dict[str, float]:
    """Return the mean score of all questions."""
    return {"accuracy": _mean(item.score for item in each(groups))}


def anls(groups: Groups) -> dict[str, float]:
    """Return the mean similarity of all questions."""
    return {"anls": _mean(item.score for item in each(groups))}


def points(groups: Groups) -> dict[str, float]:
    """OCRBench: return the share and the number of right answers; the number, of 1000, is the final score."""
    return mean(groups) | {"points": sum(item.score for item in each(groups))}


def circular(groups: Groups) -> dict[str, float]:
    """MMBench: a question is right if all its rotations are; `vanilla` is the share of the unrotated ones.

    The data file contains the rotations. Without any, both numbers are equal.

    Source: CircularEval of arXiv 2307.06281, section 4.2.
    """
    return {
        "circular": _mean(min(item.score for item in group) for group in groups),
        "vanilla": _mean(_original(group).score for group in groups),
        "rotations": _mean(float(len(group)) for group in groups),
    }


def seen_and_blind(groups: Groups) -> dict[str, float]:
    """Generated pages: the share that is right, and the share with another page's image (blind).

    A group consists of a question and the same question asked blind. The group's name is the question's id.
    """
    blind = [item for group in groups for item in group if item.id != item.group]
    return {"accuracy": _mean(_original(group).score for group in groups), "blind": _mean(item.score for item in blind)}


def each(groups: Groups) -> list[Graded]:
    """Return every question as one unit of a comparison."""
    return [item for group in groups for item in group]


def worst(groups: Groups) -> list[Graded]:
    """Return a question and its rotations as one unit with the lowest score among them."""
    return [replace(_original(group), score=min(item.score for item in group)) for group in groups]


def seen(groups: Groups) -> list[Graded]:
    """Return each question that was not asked blind as one unit of a comparison."""
    return [_original(group) for group in groups]


def _original(group: Sequence[Graded]) -> Graded:
    """Return the question that gave the group its name: not rotated, not blind."""
    return next((item for item in group if item.id == item.group), group[0])


def mme(groups: Groups) -> dict[str, float]:
    """MME: accuracy per question, accuracy+ per image with both questions right, and their sums in points.

    A subtask gives 100 * (accuracy + accuracy+); perception is the sum of ten, cognition of four, total of both. An
    image that does not have two questions, as in a part of the file, does not count as right.

    Source: arXiv 2306.13394, section 2.2, and its `calculation.py`.
    """

    def accuracies(pairs: Groups) -> tuple[float, float]:
        both = [float(len(pair) == 2 and all(item.score == 1 for item in pair)) for pair in pairs]
        return _mean(item.score for item in each(pairs)), _mean(both)

    by_task: dict[str, list[Sequence[Graded]]] = defaultdict(list)
    for group in groups:
        by_task[group[0].categories[0]].append(group)
    gained = {task: 100 * sum(accuracies(pairs)) for task, pairs in by_task.items()}
    perception = sum(gained.get(task, 0.0) for task in MME_PERCEPTION)
    cognition = sum(gained.get(task, 0.0) for task in MME_COGNITION)
    accuracy, plus = accuracies(groups)
    return {
        "total": perception + cognition,
        "perception": perception,
        "cognition": cognition,
        "accuracy": accuracy,
        "accuracy_plus": plus,
    }


def yes_or_no(groups: Groups) -> dict[str, float]:
    """POPE, with yes as the positive answer. An answer that is neither yes nor no is wrong and does not count as yes.

    Source: arXiv 2305.10355, section 4.1, and its `evaluate.py`.
    """
    graded = each(groups)
    said = sum(item.parsed == "yes" for item in graded)
    meant = sum(item.truth == "yes" for item in graded)
    both = sum(item.parsed == item.truth == "yes" for item in graded)
    precision, recall = both / said if said else 0.0, both / meant if meant else 0.0
    return {
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "accuracy": _mean(item.score for item in graded),
        "precision": precision,
        "recall": recall,
        "yes_ratio": said / len(graded) if graded else 0.0,
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def interval(
    statistic: Callable[[Indices], float],
    strata: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of a statistic; the same seed gives the same draws.

    Args:
        statistic: Indices of drawn units -> the number. Units are questions, or groups of questions that belong
            together. They are drawn with replacement within each stratum.
        strata: The part of the benchmark of each unit; all equal if there are no parts.
        resamples: Number of draws.
        level: Share of the draws inside the interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    draws, labels = np.random.default_rng(seed), np.asarray(strata)
    parts = [np.flatnonzero(labels == label) for label in sorted(set(strata))]
    found = [
        statistic(np.concatenate([part[draws.integers(len(part), size=len(part))] for part in parts]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the `interval` of the mean of single units."""
    array = np.asarray(values, dtype=np.float64)
    return interval(lambda drawn: float(array[drawn].mean()), [""] * len(array), seed=seed, resamples=resamples)


def accuracy_of(hits: Sequence[bool]) -> dict[str, float]:
    """Return the share of hits, their number `n`, and the 95 % bootstrap interval `low` to `high`."""
    low, high = mean_interval([float(hit) for hit in hits])
    return {"n": len(hits), "accuracy": rounded(sum(hits) / len(hits)), "low": rounded(low), "high": rounded(high)}


def rounded(value: float) -> float:
    """Round to four places, which is finer than any benchmark can measure."""
    return round(value, 4)
