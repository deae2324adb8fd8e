"""Studies on generated pages: reading by the height of the text, and answers about perturbed pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from convllava.checkpoints.tensors import weights_digest
from convllava.display import check_can_draw, progress_bar
from convllava.errors import ConfigError
from convllava.evaluation.aggregate import accuracy_of, mean_interval, rounded
from convllava.evaluation.perturbations import PERTURBATIONS, SEVERITIES, Perturbation
from convllava.evaluation.report import plot_heights, plot_severities
from convllava.evaluation.runner import describe_model, open_model, versions
from convllava.evaluation.synthetic import describe_world, grade_pages, text_height
from convllava.geometry import Size
from convllava.inference import Assistant
from convllava.io import WEIGHTS, ResumableJsonl, write_json
from convllava.synthetic import World

EDGES = (0, 12, 16, 20, 24, 28, 32, 38, 46, 56, 80, 160)
"""Edges of the bins of heights, in pixels that the tower sees."""
FEWEST = 20
"""Bins with fewer answers are left out."""
READING = ("read", "field", "table")
"""Tasks whose answers are printed on the page."""
_CLEAN = Perturbation("none", ("",))
_SKIPPED = ("ground", "position")
"""Tasks whose right answers change if the page is rotated or stretched."""


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
    assistant, journal, report = _open_study("sweep", model, world, samples, folder)
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


def robustness(
    model: Assistant | str | os.PathLike[str], world: World, samples: int, output: str | os.PathLike[str]
) -> dict[str, Any]:
    """Ask the same questions about the same pages, perturbed in each of seven ways at four severities.

    Args:
        model: The model, or what `convllava.load` loads it from.
        world: Where the pages come from. Questions about positions and boxes are left out.
        output: Folder for robustness.json and robustness.png. A run that was killed continues there.

    Returns:
        The settings, `clean` (the accuracy on unchanged pages), and `rows`: kind, severity, value, accuracy and its
        95 % interval, and the accuracy lost against clean pages with the interval of the paired difference.

    Raises:
        InputError: if the model or the output folder cannot be used, or matplotlib is missing.
    """
    folder = Path(output)
    assistant, journal, report = _open_study("robustness", model, world, samples, folder)
    pages = []
    for page in map(world.sample, range(samples)):
        pages.append(replace(page, turns=tuple(turn for turn in page.turns if turn.task not in _SKIPPED)))

    cases = [(_CLEAN, 0), *((kind, severity) for kind in PERTURBATIONS for severity in SEVERITIES)]
    with progress_bar("robustness") as progress:
        for number, (kind, severity) in enumerate(cases, start=1):
            case = f"{kind.kind}/{severity}"
            if case not in journal.entries:
                perturbed = []
                for page in pages:
                    turns = tuple(replace(turn, question=kind.question(turn.question, severity)) for turn in page.turns)
                    perturbed.append(replace(page, image=kind.page(page.image, severity), turns=turns))
                images = [assistant.encode(page.image) for page in perturbed]
                journal.add([{"id": case, "hits": grade_pages(assistant, perturbed, images)}])
            progress(number / len(cases))

    clean, rows = journal.entries["none/0"]["hits"], []
    for kind in PERTURBATIONS:
        for severity, value in zip(SEVERITIES, kind.values, strict=True):
            hits = journal.entries[f"{kind.kind}/{severity}"]["hits"]
            lost = [float(before) - float(after) for before, after in zip(clean, hits, strict=True)]
            low, high = mean_interval(lost)
            rows.append(
                {"kind": kind.kind, "severity": severity, "value": value}
                | accuracy_of(hits)
                | {"lost": rounded(sum(lost) / len(lost)), "lost_low": rounded(low), "lost_high": rounded(high)}
            )
    report |= {"clean": accuracy_of(clean), "rows": rows}
    write_json(folder / "robustness.json", report)
    plot_severities(report["clean"]["accuracy"], rows, folder / "robustness.png")
    return report


def _open_study(
    kind: str, model: Assistant | str | os.PathLike[str], world: World, samples: int, folder: Path
) -> tuple[Assistant, ResumableJsonl, dict[str, Any]]:
    """Return the model, the journal KIND.jsonl, and the beginning of the report of a study on generated pages.

    Raises:
        InputError: if the model or the folder cannot be used, or matplotlib, which will draw the plot, is missing.
    """
    check_can_draw("eval")
    name, assistant = open_model(model)
    settings = {
        "kind": kind,
        "model": name,
        WEIGHTS: weights_digest(assistant.model),
        "samples": samples,
        "world": describe_world(world),
    }
    journal = ResumableJsonl(folder, settings, f"{kind}.jsonl")
    return assistant, journal, settings | {"model": describe_model(name, assistant), "versions": versions()}
