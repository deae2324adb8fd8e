"""What a model can read: accuracy on printed answers by the height of their characters, at several resolutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from convllava.checkpoints.tensors import weights_digest
from convllava.display import check_can_draw, progress_bar
from convllava.errors import InputError
from convllava.evaluation.plots import plot_heights
from convllava.evaluation.results import accuracy_of
from convllava.evaluation.runner import describe, versions
from convllava.evaluation.synthetic import describe_world, text_height
from convllava.evaluation.synthetic_report import judge
from convllava.geometry import Size
from convllava.inference import Assistant
from convllava.io import WEIGHTS, ResumableJsonl, write_json
from convllava.synthetic import Sample, World

EDGES = (0, 12, 16, 20, 24, 28, 32, 38, 46, 56, 80, 160)
"""Of the bins, in pixels that the tower sees."""
FEWEST = 20
"""Answers that a bin needs to be shown."""
READING = ("read", "field", "table")
"""Tasks whose answers are printed on the page."""


def sweep(
    model: str, assistant: Assistant, world: World, samples: int, sides: Sequence[int], output: Path
) -> dict[str, Any]:
    """Ask what is printed on a world's pages, at each of several resolutions.

    Args:
        model: What the assistant was loaded from.
        assistant: Who answers; the pixels of its image processor are changed.
        world: Where the pages come from.
        samples: How many pages.
        sides: Square roots of the areas, in pixels, that pages are brought to; the aspect ratio is kept.
        output: Folder for sweep.json and sweep.png, and for what a killed run continues from.

    Returns:
        `resolutions`, the accuracy at each side, and `rows`, the accuracy by side and bin of heights (`height` is the
        mean in the bin).

    Raises:
        InputError: no page has a printed answer, or a side is not to be had.
    """
    check_can_draw("eval")
    settings = {
        "kind": "sweep",
        "model": model,
        WEIGHTS: weights_digest(assistant.model),
        "samples": samples,
        "world": describe_world(world),
    }
    journal = ResumableJsonl(output, settings, "sweep.jsonl")
    pages = [_printed(world.sample(index)) for index in range(samples)]
    if not any(page.turns for page in pages):
        raise InputError("none of the pages has an answer that is printed on it; raise --samples")
    for side in sides:
        if str(side) not in journal.entries:
            journal.add([{"id": str(side), "answers": _measured(assistant, pages, side)}])
    found = {side: journal.entries[str(side)]["answers"] for side in sides}
    report: dict[str, Any] = settings | {
        "model": describe(model, assistant),
        "versions": versions(),
        "resolutions": [{"side": side} | accuracy_of([hit for _, hit in answers]) for side, answers in found.items()],
        "rows": [row for side, answers in found.items() for row in _by_height(side, answers)],
    }
    write_json(output / "sweep.json", report)
    plot_heights(report["rows"], output / "sweep.png")
    return report


def _printed(page: Sample) -> Sample:
    """The page with those of its turns whose answers are printed on it."""
    turns = tuple(turn for turn in page.turns if turn.task in READING and text_height(page, turn) is not None)
    return replace(page, turns=turns)


def _measured(assistant: Assistant, pages: Sequence[Sample], side: int) -> list[tuple[float, bool]]:
    """Of each turn the height of its answer as the tower sees it, and whether the model read it."""
    with _at(assistant, side) as processor, progress_bar(f"{side} pixels") as progress:
        images = [assistant.encode(page.image) for page in pages]
        hits = judge(assistant, pages, images, progress)
        scales = [processor.placement(Size(page.image.height, page.image.width)).scale_y for page in pages]
    heights = [
        scale * (text_height(page, turn) or 0.0)
        for page, scale in zip(pages, scales, strict=True)
        for turn in page.turns
    ]
    return list(zip(heights, hits, strict=True))


@contextmanager
def _at(assistant: Assistant, side: int) -> Iterator[Any]:
    """The assistant's image processor, which within makes every image of one area."""
    processor = assistant.processor.image_processor
    before = {name: getattr(processor, name) for name in ("mode", "min_pixels", "max_pixels")}
    processor.change(mode="native", min_pixels=side**2, max_pixels=side**2)
    try:
        yield processor
    finally:
        processor.change(**before)


def _by_height(side: int, answers: Sequence[tuple[float, bool]]) -> Iterator[dict[str, Any]]:
    for low, high in pairwise(EDGES):
        inside = [answer for answer in answers if low <= answer[0] < high]
        if len(inside) >= FEWEST:
            height = sum(height for height, _ in inside) / len(inside)
            yield {"side": side, "from": low, "to": high, "height": round(height, 1)} | accuracy_of(
                [hit for _, hit in inside]
            )
