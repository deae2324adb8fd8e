"""Check a recipe's data before it trains: every sample of every source is read once, as training would read it.

    convllava data check recipe.yaml --workers 8 --output runs/check

Writes `report.jsonl`, one line for each problem; `summary.json`, the counts; and `sizes.png`, the sizes of images and
sequences. An interrupted check of the same recipe continues, unless a data file has changed since. Changed images in
separate files are not noticed.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from convllava.data.validation import Finding, SizePlot, SourceCheck, check_source
from convllava.display import check_can_draw
from convllava.errors import DataError
from convllava.io import JsonLines, make_output, replacing, write_json
from convllava.training.datasets import check_files, mixture_sources, stamps_of
from convllava.training.initialise import initial_processor
from convllava.training.recipe import Recipe, Source
from convllava.training.stage import StageRun, resolve_stages


class SourceSummary(TypedDict):
    """One source under the settings of some stages.

    `tokens` counts the tokens of samples that can be encoded, `lost_tokens` the part that training would not see;
    `problems` counts the samples with each problem.
    """

    source: str
    stages: list[str]
    samples: int
    images: int
    tokens: int
    lost_tokens: int
    problems: dict[str, int]


class StageSummary(TypedDict):
    """`bad`: samples that training would skip; `allowed`: the largest share of bad samples."""

    stage: str
    samples: int
    bad: int
    allowed: float


class Summary(TypedDict):
    """The whole recipe, without stages that train on generated pages."""

    sources: list[SourceSummary]
    stages: list[StageSummary]


@dataclasses.dataclass
class CheckedSource:
    """A source to check, and the stages (or their evaluations) that use it with the same settings."""

    source: Source
    uses: list[str]
    samples: SourceCheck
    images: int = 0
    tokens: int = 0
    lost_tokens: int = 0
    problems: Counter[str] = dataclasses.field(default_factory=Counter)

    def count(self, finding: Finding) -> None:
        self.images += len(finding.images)
        self.tokens += finding.tokens
        self.lost_tokens += finding.lost
        if finding.problem is not None:
            self.problems[finding.problem] += 1


def check(recipe: Recipe, output: Path, workers: int = 1) -> Summary:
    """Read every sample of every source, and write a report of the problems.

    Args:
        recipe: The recipe whose data are checked.
        output: Folder for the three files.
        workers: Processes that read; 0 reads in this process.

    Raises:
        InputError: if a source is missing or damaged as a whole, there is no source, or the folder cannot be created.
    """
    check_can_draw("data")
    checks = source_checks(recipe)
    if not checks:
        raise DataError(f"{recipe.name} trains on generated pages only; there is no file to check")
    make_output(output)
    files = [(stamps_of(recipe, one.source), len(one.samples)) for one in checks]
    digest = hashlib.sha256(f"{recipe.dump()}{files}".encode()).hexdigest()
    log = FindingsLog(output / ".checked.jsonl", digest)
    check_all([one.samples for one in checks], log, workers)

    sizes = SizePlot()
    with replacing(output / "report.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        for number, finding in log:
            checks[number].count(finding)
            sizes.add(finding)
            if finding.problem is not None:
                line = {"source": checks[number].source.name, "stages": checks[number].uses, "index": finding.index}
                line |= {"id": finding.id, "problem": finding.problem, "detail": finding.detail}
                file.write(json.dumps(line) + "\n")
    summary = _summary(recipe, checks)
    write_json(output / "summary.json", summary)
    with replacing(output / "sizes.png") as partial:
        sizes.draw(partial, recipe.name)
    log.path.unlink()
    return summary


def source_checks(recipe: Recipe) -> list[CheckedSource]:
    """Return one check for each source and each combination of settings that stages use with it.

    Raises:
        InputError: if a source is missing or damaged as a whole.
    """
    found: dict[str, CheckedSource] = {}
    for run in stages_with_files(recipe):
        stage = run.stage
        uses = [stage.name] * len(stage.data.sources)
        uses += [f"{stage.name} (evaluation)"] * (len(stage.all_sources) - len(uses))
        for source, use in zip(stage.all_sources, uses, strict=True):
            alone = dataclasses.replace(source, repeat=1.0, weight=None)
            settings = run.processor.image_processor.to_dict(), stage.data.max_tokens, stage.data.overlong
            key = repr((alone, *settings))
            if key not in found:
                found[key] = CheckedSource(alone, [], samples_of(run, alone))
            found[key].uses.append(use)
    return list(found.values())


def stages_with_files(recipe: Recipe, output: Path = Path()) -> list[StageRun]:
    """Return the stages that have files. The model's weights are not loaded.

    Raises:
        InputError: if a file is missing, or the recipe's processor cannot be made.
    """
    if not any(stage.all_sources for stage in recipe.stages):
        return []
    check_files(recipe)
    return [run for run in resolve_stages(recipe, initial_processor(recipe), output) if run.stage.all_sources]


def samples_of(run: StageRun, source: Source) -> SourceCheck:
    """Return the samples of a source, to be checked under the settings of a stage."""
    (opened,) = mixture_sources(run.recipe, [source])
    return SourceCheck(opened, run.processor, run.stage.data.max_tokens, run.stage.data.overlong == "truncate")


class FindingsLog(JsonLines):
    """The findings so far, one line each, in a file that a killed check continues.

    Args:
        path: The file.
        header: Digest of everything that is checked. A file with another digest is emptied.
    """

    def __iter__(self) -> Iterator[tuple[int, Finding]]:
        """Yield the number of the source, and the finding."""
        for number, *values in super().__iter__():
            yield number, Finding(*values)

    def add(self, number: int, findings: Sequence[Finding]) -> None:
        """Write findings of a source.

        Raises:
            InputError: if the file cannot be written.
        """
        self.append([number, *dataclasses.astuple(finding)] for finding in findings)


def check_all(sources: Sequence[SourceCheck], log: FindingsLog, workers: int, doing: str = "checking") -> None:
    """Check all samples that the log does not have yet, and show a progress bar.

    Args:
        sources: Samples to check.
        log: The findings, which are added to it.
        workers: Processes that read; 0 reads in this process.
        doing: Text in front of the progress bar.
    """
    done = Counter(number for number, _ in log)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(doing, total=sum(map(len, sources)), completed=done.total())
        for number, samples in enumerate(sources):
            bar.update(task, description=f"{doing} {samples.name}")
            for findings in check_source(samples, workers, done[number]):
                log.add(number, findings)
                bar.advance(task, len(findings))


def _summary(recipe: Recipe, checks: Sequence[CheckedSource]) -> Summary:
    stages: list[StageSummary] = []
    for stage in recipe.stages:
        own = [one for one in checks if stage.name in one.uses]
        if own:
            samples = sum(len(one.samples) for one in own)
            bad = sum(one.problems.total() - one.problems["cut"] for one in own)  # training uses samples that it cuts
            stages.append({"stage": stage.name, "samples": samples, "bad": bad, "allowed": stage.data.max_skipped})
    sources: list[SourceSummary] = [
        {
            "source": one.source.name,
            "stages": one.uses,
            "samples": len(one.samples),
            "images": one.images,
            "tokens": one.tokens,
            "lost_tokens": one.lost_tokens,
            "problems": dict(one.problems.most_common()),
        }
        for one in checks
    ]
    return {"sources": sources, "stages": stages}


def verdict(summary: Summary) -> str | None:
    """Return why the data cannot train a stage; None if they can."""
    for stage in summary["stages"]:
        name, samples, bad = f"stage {stage['stage']}", stage["samples"], stage["bad"]
        if bad == samples:
            return f"{name}: none of its {samples:,} samples can be used; report.jsonl lists the reasons"
        if bad > stage["allowed"] * samples:
            return (
                f"{name}: {bad:,} of {samples:,} samples are bad, more than data.max_skipped {stage['allowed']:g} "
                "allows; report.jsonl lists them"
            )
    return None


def table_of(summary: Summary) -> Table:
    """Return a table for the terminal: for each source its size, and the samples with each problem."""
    table = Table(title="data, as training would see them", title_justify="left")
    table.add_column("source")
    table.add_column("count of")
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
