"""How much a model loses when pages are turned, blurred, compressed ... and questions are put in other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convllava.checkpoints.tensors import weights_digest
from convllava.display import check_can_draw, progress_bar
from convllava.evaluation.intervals import mean_interval
from convllava.evaluation.perturbations import DISTURBANCES, SEVERITIES, Disturbance
from convllava.evaluation.plots import plot_severities
from convllava.evaluation.results import accuracy_of, rounded
from convllava.evaluation.runner import describe, versions
from convllava.evaluation.synthetic import describe_world
from convllava.evaluation.synthetic_report import judge
from convllava.inference import Assistant
from convllava.io import WEIGHTS, ResumableJsonl, write_json
from convllava.synthetic import Sample, World

_CLEAN = Disturbance("none", ("",))
_LEFT_OUT = ("ground", "position")
"""Tasks whose right answers change with the page."""


def robustness(model: str, assistant: Assistant, world: World, samples: int, output: Path) -> dict[str, Any]:
    """Ask the same questions about the same pages, disturbed in each of seven ways at four severities.

    Args:
        model: What the assistant was loaded from.
        assistant: Who answers.
        world: Where the pages come from; questions for places and boxes are left out, since turning and stretching
            changes their answers.
        samples: How many pages.
        output: Folder for robustness.json and robustness.png, and for what a killed run continues from.

    Returns:
        `clean`, the row of the pages as they are, and `rows`: kind, severity, value, accuracy, the 95 % interval of
        the accuracy, and what it has lost against clean, with the interval of the paired difference.
    """
    check_can_draw("eval")
    settings = {
        "kind": "robustness",
        "model": model,
        WEIGHTS: weights_digest(assistant.model),
        "samples": samples,
        "world": describe_world(world),
    }
    journal = ResumableJsonl(output, settings, "robustness.jsonl")
    pages = [_asked(world.sample(index)) for index in range(samples)]
    cases = [(_CLEAN, 0), *((kind, severity) for kind in DISTURBANCES for severity in SEVERITIES)]
    with progress_bar("robustness") as progress:
        for number, (kind, severity) in enumerate(cases, start=1):
            name = f"{kind.kind}/{severity}"
            if name not in journal.entries:
                journal.add([{"id": name, "hits": _hits(assistant, pages, kind, severity)}])
            progress(number / len(cases))
    hits = {name: entry["hits"] for name, entry in journal.entries.items()}
    report: dict[str, Any] = settings | {"model": describe(model, assistant), "versions": versions()} | _rows(hits)
    write_json(output / "robustness.json", report)
    plot_severities(report["clean"]["accuracy"], report["rows"], output / "robustness.png")
    return report


def _rows(hits: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """What was right on clean pages, and for each kind and severity; hits are by "kind/severity"."""
    clean = hits["none/0"]
    rows = []
    for kind in DISTURBANCES:
        for severity, value in zip(SEVERITIES, kind.values, strict=True):
            found = hits[f"{kind.kind}/{severity}"]
            case = {"kind": kind.kind, "severity": severity, "value": value}
            rows.append(case | accuracy_of(found) | _loss(clean, found))
    return {"clean": accuracy_of(clean), "rows": rows}


def _asked(page: Sample) -> Sample:
    return replace(page, turns=tuple(turn for turn in page.turns if turn.task not in _LEFT_OUT))


def _hits(assistant: Assistant, pages: Sequence[Sample], kind: Disturbance, severity: int) -> list[bool]:
    disturbed = [_disturbed(page, kind, severity) for page in pages]
    images = [assistant.encode(page.image) for page in disturbed]
    return judge(assistant, disturbed, images, lambda share: None)


def _disturbed(page: Sample, kind: Disturbance, severity: int) -> Sample:
    turns = tuple(replace(turn, question=kind.question(turn.question, severity)) for turn in page.turns)
    return replace(page, image=kind.page(page.image, severity), turns=turns)


def _loss(clean: Sequence[bool], hits: Sequence[bool]) -> dict[str, float]:
    lost = [float(before) - float(after) for before, after in zip(clean, hits, strict=True)]
    low, high = mean_interval(lost)
    return {"lost": rounded(sum(lost) / len(lost)), "lost_low": rounded(low), "lost_high": rounded(high)}
