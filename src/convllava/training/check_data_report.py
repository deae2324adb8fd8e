"""Check every sample of a recipe's files once: each source with each of its settings, in a log that survives a kill."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convllava.data.validation import Finding, SourceCheck, check_source
from convllava.io import JsonLines
from convllava.model.processing import ConvLlavaProcessor
from convllava.training.datasets import mixture_sources
from convllava.training.initialise import check_pixels, processor_of
from convllava.training.recipe import Recipe, Source, Stage


@dataclass(frozen=True)
class Job:
    """A source to look at, and the uses of it with the same settings: stages, or their evaluations."""

    source: Source
    uses: list[str]
    examination: SourceCheck


def jobs_of(recipe: Recipe) -> list[Job]:
    """The distinct pairs of a source and of what bears on its samples.

    Raises:
        InputError: a source that is missing or damaged as a whole.
    """
    found: dict[str, Job] = {}
    for index, processor in stages_with_files(recipe):
        stage = recipe.stages[index]
        uses = [stage.name] * len(stage.data.sources)
        uses += [f"{stage.name} (evaluation)"] * (len(stage.all_sources) - len(uses))
        for source, use in zip(stage.all_sources, uses, strict=True):
            alone = dataclasses.replace(source, repeat=1.0, weight=None)
            key = repr((alone, processor.image_processor.to_dict(), stage.data.max_tokens, stage.data.overlong))
            if key not in found:
                found[key] = Job(alone, [], examination_of(recipe, stage, alone, processor))
            found[key].uses.append(use)
    return list(found.values())


def stages_with_files(recipe: Recipe) -> Iterator[tuple[int, ConvLlavaProcessor]]:
    """The number of each stage that has files, and the processor as it is then; the next one changes it."""
    if not any(stage.all_sources for stage in recipe.stages):
        return
    processor = processor_of(recipe)
    check_pixels(recipe, processor.image_processor)
    for index, stage in enumerate(recipe.stages):
        processor.image_processor.change(**stage.pixels)
        if stage.all_sources:
            yield index, processor


def examination_of(recipe: Recipe, stage: Stage, source: Source, processor: ConvLlavaProcessor) -> SourceCheck:
    """A source's samples as the stage would see them."""
    (opened,) = mixture_sources(recipe, [source])
    return SourceCheck(opened, processor, stage.data.max_tokens, stage.data.overlong == "truncate")


class FindingsLog(JsonLines):
    """The findings so far, one line each, in a file that a killed check continues.

    Args:
        path: The file.
        header: Digest of everything that is checked. A file with another digest is emptied.
    """

    def __iter__(self) -> Iterator[tuple[int, Finding]]:
        """Yield the number of the job, and the finding."""
        for job, *values in super().__iter__():
            yield job, Finding(*values)

    def add(self, job: int, findings: Sequence[Finding]) -> None:
        """Write findings of a job.

        Raises:
            InputError: if the file cannot be written.
        """
        self.append([job, *dataclasses.astuple(finding)] for finding in findings)


def examine_all(examinations: Sequence[SourceCheck], log: FindingsLog, workers: int, doing: str = "checking") -> None:
    """Check all samples that the log does not have yet, with a progress bar."""
    done = Counter(job for job, _ in log)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        whole = sum(map(len, examinations))
        task = bar.add_task(doing, total=whole, completed=done.total())
        for number, examination in enumerate(examinations):
            bar.update(task, description=f"{doing} {examination.name}")
            for findings in check_source(examination, workers, done[number]):
                log.add(number, findings)
                bar.advance(task, len(findings))
