"""What is wrong with a recipe's data, before it trains: every sample of every source is read once.

    convllava data check recipe.yaml --workers 8 --output runs/check

`report.jsonl` has one line a problem, `summary.json` the counts, `sizes.png` how large images and sequences are. What
was found is noted as it comes, and a check of the same recipe that was interrupted goes on where it was, unless a data
file has changed since; images in files of their own are not looked at for that.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from rich.table import Table

from convllava.data.validation import Finding, SizePlot
from convllava.display import check_can_draw
from convllava.errors import InputError
from convllava.io import make_output, replacing, write_json
from convllava.training.check_data_report import FindingsLog, Job, examine_all, jobs_of
from convllava.training.datasets import stamps_of
from convllava.training.recipe import Recipe


class SourceSummary(TypedDict):
    """One source under the settings of stages, or of their evaluations: its samples, how many of them have which
    problem, the tokens of those that can be encoded, and how many of these training would not see."""

    source: str
    stages: list[str]
    samples: int
    images: int
    tokens: int
    lost_tokens: int
    problems: dict[str, int]


class StageSummary(TypedDict):
    """`bad`: samples that training would skip; `allowed`: the share of them that it bears."""

    stage: str
    samples: int
    bad: int
    allowed: float


class Summary(TypedDict):
    """Of a whole recipe; stages that learn from generated pages are left out."""

    sources: list[SourceSummary]
    stages: list[StageSummary]


@dataclass
class Tally:
    """What was found in one source."""

    job: Job
    images: int = 0
    tokens: int = 0
    lost_tokens: int = 0
    problems: Counter[str] = field(default_factory=Counter)

    def count(self, finding: Finding) -> None:
        self.images += len(finding.images)
        self.tokens += finding.tokens
        self.lost_tokens += finding.lost
        if finding.problem is not None:
            self.problems[finding.problem] += 1

    @property
    def bad(self) -> int:
        """Samples that training would skip."""
        return self.problems.total() - self.problems["cut"]

    def summary(self) -> SourceSummary:
        return {
            "source": self.job.source.name,
            "stages": self.job.uses,
            "samples": len(self.job.examination),
            "images": self.images,
            "tokens": self.tokens,
            "lost_tokens": self.lost_tokens,
            "problems": dict(self.problems.most_common()),
        }


def check(recipe: Recipe, output: Path, workers: int = 1) -> Summary:
    """Read every sample of every source, in parallel, and write what is wrong with them.

    Args:
        recipe: Whose data.
        output: Folder for the three files.
        workers: Processes that read; 0 reads in this one.

    Raises:
        InputError: a source that is missing or damaged as a whole, no source at all, or a folder that cannot be.
    """
    check_can_draw("data")
    jobs = jobs_of(recipe)
    if not jobs:
        raise InputError(f"{recipe.name} learns from generated pages alone; there is no file to check")
    make_output(output)
    log = FindingsLog(output / ".checked.jsonl", _digest(recipe, jobs))
    examine_all([job.examination for job in jobs], log, workers)
    summary = _write(recipe, [Tally(job) for job in jobs], log, output)
    log.path.unlink()
    return summary


def verdict(summary: Summary) -> str | None:
    """Why the data cannot train a stage; None where they can."""
    for stage in summary["stages"]:
        name, samples, bad = f"stage {stage['stage']}", stage["samples"], stage["bad"]
        if bad == samples:
            return f"{name}: none of its {samples:,} samples can be used; report.jsonl says why"
        if bad > stage["allowed"] * samples:
            return (
                f"{name}: {bad:,} of {samples:,} samples are bad, more than data.max_skipped {stage['allowed']:g} "
                "allows; report.jsonl lists them"
            )
    return None


def _digest(recipe: Recipe, jobs: list[Job]) -> str:
    """Of all that findings depend on, but for images in files of their own."""
    files = [(stamps_of(recipe, job.source), len(job.examination)) for job in jobs]
    return hashlib.sha256(f"{recipe.dump()}{files}".encode()).hexdigest()


def _write(recipe: Recipe, tallies: list[Tally], log: FindingsLog, output: Path) -> Summary:
    sizes = SizePlot()
    with replacing(output / "report.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        for number, finding in log:
            tallies[number].count(finding)
            sizes.add(finding)
            if finding.problem is not None:
                file.write(json.dumps(_line(tallies[number].job, finding)) + "\n")
    summary = _summary(recipe, tallies)
    write_json(output / "summary.json", summary)
    with replacing(output / "sizes.png") as partial:
        sizes.draw(partial, recipe.name)
    return summary


def _line(job: Job, finding: Finding) -> dict[str, Any]:
    return {
        "source": job.source.name,
        "stages": job.uses,
        "index": finding.index,
        "id": finding.id,
        "problem": finding.problem,
        "detail": finding.detail,
    }


def _summary(recipe: Recipe, tallies: list[Tally]) -> Summary:
    stages: list[StageSummary] = []
    for stage in recipe.stages:
        own = [tally for tally in tallies if stage.name in tally.job.uses]
        if own:
            samples, bad = sum(len(tally.job.examination) for tally in own), sum(tally.bad for tally in own)
            stages.append({"stage": stage.name, "samples": samples, "bad": bad, "allowed": stage.data.max_skipped})
    return {"sources": [tally.summary() for tally in tallies], "stages": stages}


def table_of(summary: Summary) -> Table:
    """Of each source its sizes, and under them how many samples have which problem."""
    table = Table(title="data, as training would see them", title_justify="left")
    table.add_column("source")
    table.add_column("what")
    table.add_column("number", justify="right")
    for source in summary["sources"]:
        table.add_section()
        sizes = {
            "samples": source["samples"],
            "images": source["images"],
            "tokens": source["tokens"],
            "tokens that training would not see": source["lost_tokens"],
        }
        for row, (what, number) in enumerate([*sizes.items(), *source["problems"].items()]):
            table.add_row("" if row else source["source"], what, f"{number:,}")
    return table
