"""Robustness: what a model loses if pages are rotated, blurred, compressed ... and questions are reworded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from convllava.display import progress_bar
from convllava.evaluation.aggregate import accuracy_of, mean_interval, rounded
from convllava.evaluation.perturbations import PERTURBATIONS, SEVERITIES, Perturbation
from convllava.evaluation.report import plot_severities
from convllava.evaluation.runner import open_study
from convllava.evaluation.synthetic import grade_pages
from convllava.inference import Assistant
from convllava.io import write_json
from convllava.synthetic import World

_CLEAN = Perturbation("none", ("",))
_SKIPPED = ("ground", "position")
"""Tasks whose right answers change if the page is rotated or stretched."""


def robustness(
    model: Assistant | str | os.PathLike[str], world: World, samples: int, output: str | os.PathLike[str]
) -> dict[str, Any]:
    """Ask the same questions about the same pages, perturbed in each of seven ways at four severities.

    Args:
        model: The model, or what `convllava.load` loads it from.
        world: Where the pages come from. Questions about positions and boxes are left out.
        samples: Number of pages.
        output: Folder for robustness.json and robustness.png. A run that was killed continues there.

    Returns:
        The settings, `clean` (the accuracy on unchanged pages), and `rows`: kind, severity, value, accuracy and its
        95 % interval, and the accuracy lost against clean pages with the interval of the paired difference.

    Raises:
        InputError: if the model or the output folder cannot be used, or matplotlib is missing.
    """
    folder = Path(output)
    assistant, journal, report = open_study("robustness", model, world, samples, folder)
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
