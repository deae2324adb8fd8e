"""When an answer counts as right, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

from convllava.evaluation.vqa_normalisation import normalise
from convllava.geometry import Box, parse_box


def exact_match(answer: str, truth: str) -> bool:
    """The same characters, but for white space at the ends."""
    return answer.strip() == truth.strip()


def relaxed_match(answer: str, truth: str, tolerance: float = 0.05) -> bool:
    """Numbers within `tolerance` of the truth, anything else exactly equal.

    Source: relaxed accuracy of ChartQA (arXiv 2203.10244, section 5), there attributed to PlotQA.
    """
    try:
        value, target = float(answer), float(truth)
    except ValueError:
        return exact_match(answer, truth)
    return abs(value - target) <= tolerance * abs(target)


def chart_match(answer: str, truth: str, tolerance: float = 0.05) -> bool:
    """`relaxed_match` as ChartQA's numbers are published: percentages are numbers, case does not matter.

    "45%" is 0.45 on either side, so that "45" is wrong where the truth is "45%". Where the truth is 0 or no number,
    the texts must be equal but for case. Thousands with commas are no numbers.

    Source: `relaxed_correctness` of google-research/pix2struct (metrics.py), the rule that Qwen-VL, VLMEvalKit and
    lmms-eval report ChartQA by.
    """
    value, target = _number(answer), _number(truth)
    if value is not None and target:
        return abs(value - target) / abs(target) <= tolerance
    return answer.strip().lower() == truth.strip().lower()


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Of ten people's answers: the mean, over leaving each one out, of min(1, equal answers among the rest / 3).

    In steps: 0, 0.3, 0.6, 0.9, 1 for none, one, two, three, and four or more of ten who agree.

    Source: arXiv 1505.00468 (VQA); the TextVQA challenge leaves each out in turn. Texts are compared as
    `normalising.normalise` leaves them.
    """
    found, given = normalise(answer), [normalise(truth) for truth in truths]
    agreeing = given.count(found)
    shares = [min(1.0, (agreeing - (truth == found)) / 3) for truth in given]
    return sum(shares) / len(shares)


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest truth, and 0 where that is below the threshold.

    A similarity of exactly 0.5 counts as 0.5, as in the official script (`if result < threshold: result = 0`); the
    formula in the paper keeps similarities *above* 0.5 alone. Texts are compared in lower case, runs of white space as
    one blank and none at the ends; the script takes their lengths before that, so that blanks would add similarity.

    Source: arXiv 1905.13648 (ST-VQA), equation 1; arXiv 2007.00398 (DocVQA); the script of rrc.cvc.uab.es, task 17.
    """
    nearest = max(similarity(answer, truth) for truth in truths)
    return nearest if nearest >= threshold else 0.0


def similarity(a: str, b: str) -> float:
    """1 less the edits from one text to the other over the length of the longer; 1 for two empty texts."""
    a, b = " ".join(a.lower().split()), " ".join(b.lower().split())
    longer = max(len(a), len(b))
    return 1 - edit_distance(a, b) / longer if longer else 1.0


def edit_distance(a: str, b: str) -> int:
    """Characters to insert, delete or change to get from one text to the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for number, character in enumerate(a, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(b, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (character != other))
    return row[-1]


def contains(answer: str, truths: Sequence[str], *, is_formula: bool = False) -> bool:
    """One of the truths stands in the answer, whatever the case; a formula keeps its case and loses its blanks.

    Source: OCRBench (arXiv 2305.07895): containment for all tasks; handwritten mathematical expressions (HME100k) are
    compared without blanks and with their case.
    """
    return any(_plain(truth, is_formula) in _plain(answer, is_formula) for truth in truths)


def _plain(text: str, is_formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if is_formula else text.lower()


def intersection_over_union(a: Box, b: Box) -> float:
    """Area shared over area covered by either, 0 to 1; a box with no area shares none."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    covered = _area(a) + _area(b) - shared
    return shared / covered if covered > 0 else 0.0


def box_match(answer: str, truth: str, threshold: float = 0.5) -> bool:
    """Both name a box and the boxes' IoU reaches the threshold (the RefCOCO rule, accuracy at IoU 0.5)."""
    found, target = parse_box(answer), parse_box(truth)
    return found is not None and target is not None and intersection_over_union(found, target) >= threshold


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
