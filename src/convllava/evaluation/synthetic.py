"""Generated pages as questions: each is asked about its own page and, blind, about the next page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from convllava.errors import ConfigError
from convllava.evaluation.questions import Question
from convllava.evaluation.rules import matches_task
from convllava.inference import Assistant, EncodedImage
from convllava.synthetic import TASKS, Sample, Turn, World

BATCH_SIZE = 64


@dataclass(frozen=True)
class PagePicture:
    """A generated page, drawn when it is needed."""

    index: int
    world: World = field(compare=False, repr=False)

    def load(self) -> Image.Image:
        return self.world.sample(self.index).image


def generated_questions(world: World, samples: int) -> list[Question]:
    """Return the questions of a world's first pages, ordered by the image that they show, so each is encoded once.

    Question j of page i has the id "i/j". It is asked again about the image of the next page, as "i/j blind": a model
    that answers it correctly has guessed.

    Raises:
        ConfigError: if there are fewer than two pages, so there is no other page.
    """
    if samples < 2:
        raise ConfigError(f"`samples` must be 2 or more, because blind questions need another page; got {samples}")
    pages = [(page.index, page.turns) for page in map(world.sample, range(samples))]
    questions: list[Question] = []
    for number, (shown, turns) in enumerate(pages):
        previous, blind_turns = pages[number - 1]
        picture = PagePicture(shown, world)
        for index, asked, suffix in ((shown, turns, ""), (previous, blind_turns, " blind")):
            questions += [
                Question(
                    id=f"{index}/{place}{suffix}",
                    text=turn.question,
                    pictures=(picture,),
                    truths=(turn.answer,),
                    categories=(turn.task,),
                    group=f"{index}/{place}",
                    details={"task": turn.task},
                )
                for place, turn in enumerate(asked)
            ]
    return questions


def by_task(result: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Return a result of the generated benchmark by task: accuracy, accuracy of blind answers, and number of questions.

    Returns:
        `tasks`, `overall` and `samples`.
    """
    found = result["categories"] | {"overall": result["measures"] | {"n": result["questions"]}}
    rows = {
        name: {"accuracy": row["accuracy"], "blind": row["blind"], "n": int(row["n"]) // 2}  # each was asked twice
        for name, row in found.items()
    }
    return {
        "tasks": {task: rows[task] for task in TASKS if task in rows},
        "overall": rows["overall"],
        "samples": samples,
    }


def describe_world(world: World) -> dict[str, Any]:
    """Return the settings that a world's pages depend on."""
    return {"split": world.split, "seed": world.seed, "size": world.size, "simple": world.simple}


def grade_pages(
    assistant: Assistant,
    pages: Sequence[Sample],
    images: Sequence[EncodedImage],
    progress: Callable[[float], None] = lambda share: None,
) -> list[bool]:
    """Ask every question of each page about its image, and return which answers are right, page after page."""
    asked = [(image, turn) for page, image in zip(pages, images, strict=True) for turn in page.turns]
    answers: list[str] = []
    for batch in assistant.answer_many([(image, turn.question) for image, turn in asked], batch_size=BATCH_SIZE):
        answers += batch
        progress(len(answers) / len(asked))
    return [matches_task(turn.task, answer, turn.answer) for (_, turn), answer in zip(asked, answers, strict=True)]


def text_height(page: Sample, turn: Turn) -> float | None:
    """Return the height of the tallest character of an answer in pixels of the page's image.

    None if the page does not print the answer in this form.
    """
    printed = "".join(glyph.char for glyph in page.glyphs)
    wanted = turn.answer.replace(" ", "")
    start = printed.find(wanted) if wanted else -1
    if start < 0:
        return None
    return max(glyph.box[3] - glyph.box[1] for glyph in page.glyphs[start : start + len(wanted)])
