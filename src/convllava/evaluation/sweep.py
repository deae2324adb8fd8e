"""Reading by text height: accuracy on printed answers by the height of their characters, at several resolutions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from convllava.display import progress_bar
from convllava.errors import ConfigError
from convllava.evaluation.aggregate import accuracy_of
from convllava.evaluation.report import plot_heights
from convllava.evaluation.runner import open_study
from convllava.evaluation.synthetic import grade_pages, text_height
from convllava.geometry import Size
from convllava.inference import Assistant
from convllava.io import write_json
from convllava.synthetic import World

EDGES = (0, 12, 16, 20, 24, 28, 32, 38, 46, 56, 80, 160)
"""Edges of the bins of heights, in pixels that the tower sees."""
FEWEST = 20
"""Bins with fewer answers are left out."""
READING = ("read", "field", "table")
"""Tasks whose answers are printed on the page."""


def sweep(
    model: Assistant | str | os.PathLike[str],
    world: World,
    samples: int,
    sides: Sequence[int],
    output: str | os.PathLike[str],
) -> dict[str, Any]:
    """Ask for the texts that are printed on pages, at several resolutions.

    Args:
        model: The model, or what `convllava.load` loads it from. The settings of its image processor are changed while
            this runs.
        world: Where the pages come from.
        samples: Number of pages.
        sides: Square roots of the areas, in pixels, to which pages are resized; their aspect ratio is kept.
        output: Folder for sweep.json and sweep.png. A run that was killed continues there.

    Returns:
        The settings, `resolutions` (the accuracy at each side), and `rows` (the accuracy by side and bin of heights;
        `height` is the mean in the bin).

    Raises:
        InputError: if no page has a printed answer, a side is not possible, the model or the output folder cannot be
            used, or matplotlib is missing.
    """
    folder = Path(output)
    assistant, journal, report = open_study("sweep", model, world, samples, folder)
    pages = []
    for page in map(world.sample, range(samples)):
        turns = tuple(turn for turn in page.turns if turn.task in READING and text_height(page, turn) is not None)
        pages.append(replace(page, turns=turns))
    if not any(page.turns for page in pages):
        raise ConfigError("none of the pages has an answer that is printed on it; raise `samples`")
    processor = assistant.processor.image_processor
    before = {name: getattr(processor, name) for name in ("mode", "min_pixels", "max_pixels")}
    for side in sides:
        if str(side) in journal.entries:
            continue
        processor.change(mode="native", min_pixels=side**2, max_pixels=side**2)
        try:
            with progress_bar(f"{side} pixels") as progress:
                images = [assistant.encode(page.image) for page in pages]
                hits = grade_pages(assistant, pages, images, progress)
            scales = [processor.placement(Size(page.image.height, page.image.width)).scale_y for page in pages]
        finally:
            processor.change(**before)
        pairs = zip(pages, scales, strict=True)
        heights = [scale * (text_height(page, turn) or 0.0) for page, scale in pairs for turn in page.turns]
        journal.add([{"id": str(side), "answers": list(zip(heights, hits, strict=True))}])

    resolutions, rows = [], []
    for side in sides:
        answers = journal.entries[str(side)]["answers"]
        resolutions.append({"side": side} | accuracy_of([hit for _, hit in answers]))
        for low, high in pairwise(EDGES):
            inside = [answer for answer in answers if low <= answer[0] < high]
            if len(inside) >= FEWEST:
                height = sum(height for height, _ in inside) / len(inside)
                found = accuracy_of([hit for _, hit in inside])
                rows.append({"side": side, "from": low, "to": high, "height": round(height, 1)} | found)
    report |= {"resolutions": resolutions, "rows": rows}
    write_json(folder / "sweep.json", report)
    plot_heights(rows, folder / "sweep.png")
    return report
