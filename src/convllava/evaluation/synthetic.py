"""The generated world as questions: each of a page's, asked about its own image and, blind, about the next page's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from convllava.errors import InputError
from convllava.evaluation import aggregate
from convllava.evaluation.benchmarks import QUESTION, Benchmark
from convllava.evaluation.questions import Question
from convllava.evaluation.rules import Aids, Verdict
from convllava.evaluation.synthetic_report import Report, is_right
from convllava.synthetic import TASKS, Sample, Turn, World


@dataclass(frozen=True)
class PagePicture:
    """A page of a world, drawn when it is needed."""

    index: int
    world: World = field(compare=False, repr=False)

    def load(self) -> Image.Image:
        return self.world.sample(self.index).image


def by_task(question: Question, answer: str, aids: Aids) -> Verdict:
    """Exact match; chart values within 5 %; boxes with IoU >= 0.5 (`synthetic.is_right`)."""
    turn = Turn(question.details["task"], question.text, question.truths[0])
    return Verdict(float(is_right(turn, answer)), answer.strip() or None)


SYNTHETIC = Benchmark(
    "synthetic",
    "convllava.synthetic",
    by_task,
    QUESTION,
    QUESTION,
    summarise=aggregate.seen_and_blind,
    units=aggregate.seen,
    max_new_tokens=64,
)


def world_questions(world: World, samples: int) -> list[Question]:
    """The questions of a world's first pages, ordered by the image they are asked about, so that each is encoded once.

    Question j of page i is "i/j", and "i/j blind" about the image of the page after.

    Raises:
        InputError: fewer than two pages, so that there is no other page's image.
    """
    if samples < 2:
        raise InputError(f"the benchmark needs two pages or more to swap their images; got {samples}")
    pages = [(page.index, page.turns) for page in map(world.sample, range(samples))]
    found: list[Question] = []
    for place, (index, turns) in enumerate(pages):
        picture = PagePicture(index, world)
        found += _about(picture, index, turns, "")
        found += _about(picture, *pages[place - 1], " blind")
    return found


def _about(picture: PagePicture, index: int, turns: tuple[Turn, ...], ending: str) -> Iterator[Question]:
    for number, turn in enumerate(turns):
        yield Question(
            id=f"{index}/{number}{ending}",
            text=turn.question,
            pictures=(picture,),
            truths=(turn.answer,),
            categories=(turn.task,),
            group=f"{index}/{number}",
            details={"task": turn.task},
        )


def describe_world(world: World) -> dict[str, Any]:
    """What its pages depend on."""
    return {"split": world.split, "seed": world.seed, "size": world.size, "simple": world.simple}


def as_report(result: dict[str, Any], samples: int) -> Report:
    """A result of `SYNTHETIC` in the form of `synthetic.evaluate`."""
    found = result["categories"]
    tasks = {
        task: {"accuracy": found[task]["accuracy"], "blind": found[task]["blind"], "n": int(found[task]["n"]) // 2}
        for task in TASKS
        if task in found
    }
    measures = result["measures"]
    overall = {"accuracy": measures["accuracy"], "blind": measures["blind"], "n": result["questions"] // 2}
    # A result's measures are of any benchmark's names, so that their types are not known here.
    return {"tasks": tasks, "overall": overall, "samples": samples, "seconds": result["seconds"]}  # type: ignore[typeddict-item]


def text_height(page: Sample, turn: Turn) -> float | None:
    """Pixels from top to bottom of the tallest character of an answer, in the page's image; None where the answer is
    not printed on the page as it stands."""
    printed = "".join(glyph.char for glyph in page.glyphs)
    wanted = turn.answer.replace(" ", "")
    start = printed.find(wanted) if wanted else -1
    if start < 0:
        return None
    return max(glyph.box[3] - glyph.box[1] for glyph in page.glyphs[start : start + len(wanted)])
