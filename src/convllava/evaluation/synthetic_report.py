"""The generated world as a benchmark: held-out pages, accuracy by task, and beside it the same model with the image
of another page: what it gets right without seeing."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypedDict

from rich.table import Table

from convllava.display import progress_bar
from convllava.errors import InputError
from convllava.evaluation.metrics import box_match, exact_match, relaxed_match
from convllava.inference import Assistant, EncodedImage
from convllava.synthetic import TASKS, Sample, Turn, World

METRICS: dict[str, Callable[[str, str], bool]] = {"chart": relaxed_match, "ground": box_match}
"""Tasks not judged by exact match."""
BATCH_SIZE = 64


class Score(TypedDict):
    """Accuracy, the same with another page's image, and the number of questions."""

    accuracy: float
    blind: float
    n: int


class Report(TypedDict):
    """What a run of the benchmark found."""

    tasks: dict[str, Score]
    overall: Score
    samples: int
    seconds: float


def evaluate(
    assistant: Assistant,
    world: World,
    samples: int = 200,
    *,
    first: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Report:
    """Ask every question of `samples` pages twice: about the page, and about the next page's image.

    Args:
        assistant: Who answers.
        world: Where the pages come from.
        samples: How many pages.
        first: Index of the first page.
        progress: Called with the share of answers done, 0 to 1.

    Raises:
        InputError: fewer than two pages, so that there is no other page's image.
    """
    if samples < 2:
        raise InputError(f"the benchmark needs two pages or more to swap their images; got {samples}")
    started = time.monotonic()
    pages = [world.sample(index) for index in range(first, first + samples)]
    turns = [turn for page in pages for turn in page.turns]
    images = []
    for number, page in enumerate(pages, start=1):
        images.append(assistant.encode(page.image))
        progress(number / samples / 3)
    hits = judge(assistant, pages, images, lambda share: progress((1 + share) / 3))
    blind = judge(assistant, pages, images[1:] + images[:1], lambda share: progress((2 + share) / 3))
    by_task: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for turn, *pair in zip(turns, hits, blind, strict=True):
        by_task[turn.task].append((pair[0], pair[1]))
    return {
        "tasks": {task: _score(by_task[task]) for task in TASKS if task in by_task},
        "overall": _score([pair for pairs in by_task.values() for pair in pairs]),
        "samples": samples,
        "seconds": round(time.monotonic() - started, 1),
    }


def measure(assistant: Assistant, world: World, samples: int) -> Report:
    """`evaluate` behind a progress bar."""
    with progress_bar("measuring") as progress:
        return evaluate(assistant, world, samples, progress=progress)


def judge(
    assistant: Assistant, pages: Sequence[Sample], images: Sequence[EncodedImage], progress: Callable[[float], None]
) -> list[bool]:
    """Whether each question of each page is answered rightly when its image is shown; page after page."""
    asked = [(image, turn) for page, image in zip(pages, images, strict=True) for turn in page.turns]
    answers: list[str] = []
    for batch in assistant.answer_many([(image, turn.question) for image, turn in asked], batch_size=BATCH_SIZE):
        answers += batch
        progress(len(answers) / len(asked))
    return [is_right(turn, answer) for (_, turn), answer in zip(asked, answers, strict=True)]


def is_right(turn: Turn, answer: str) -> bool:
    """Exact match; for chart values within 5 %; for boxes IoU >= 0.5."""
    return METRICS.get(turn.task, exact_match)(answer, turn.answer)


def table_of(report: Report, title: str) -> Table:
    """The report as a table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for column in ("accuracy", "blind", "n"):
        table.add_column(column, justify="right")
    for task, score in [*report["tasks"].items(), ("overall", report["overall"])]:
        table.add_row(task, f"{score['accuracy']:.1%}", f"{score['blind']:.1%}", str(score["n"]))
    return table


def _score(pairs: Sequence[tuple[bool, bool]]) -> Score:
    count = len(pairs)
    return {
        "accuracy": round(sum(hit for hit, _ in pairs) / count, 4),
        "blind": round(sum(hit for _, hit in pairs) / count, 4),
        "n": count,
    }
