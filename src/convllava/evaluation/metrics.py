"""When an answer counts as right."""

from __future__ import annotations

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
