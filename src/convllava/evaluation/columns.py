"""Questions from the rows of a benchmark's files: the meaning of each column, and the peculiarities of each benchmark.

Columns have the names of VLMEvalKit's TSV files, of lmms-lab's Parquet files, and of the benchmarks' own JSON files.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from convllava.errors import DataError
from convllava.evaluation.aggregate import MME_COGNITION, MME_PERCEPTION
from convllava.evaluation.answer_parsing import written_options
from convllava.evaluation.benchmarks import Benchmark
from convllava.evaluation.questions import MissingPicture, Picture, PictureFile, Question
from convllava.evaluation.readers import SUFFIXES, Row, find_image, listed, read_rows

_IDS = ("index", "id", "questionId", "question_id", "data_id")
_TEXTS = ("question", "text", "query", "sent", "expression")
_TRUTHS = ("answers", "answer", "label")
_WITH_LISTS = ("docvqa", "infovqa", "textvqa", "ocrbench", "mmmu")
"""Families whose TSV files write several right answers as a list; elsewhere "[8, 3]" is one answer, as in ChartQA."""
_IMAGES = ("image", "img_path", "image_local_name", "image_path", "imgname", "imagename", "image_id")
_CATEGORIES: dict[str, tuple[str, ...]] = {
    "mmbench": ("category", "l2-category", "L2-category"),
    "mmvet": ("category", "capability"),
    "ocrbench": ("category", "question_type", "type"),
    "chartqa": ("type", "split"),
    "docvqa": ("question_types",),
    "refcoco": ("split",),
    "textvqa": (),
    "infovqa": (),
}
"""Columns with the categories of a question; `category` for the other benchmarks."""
_ROTATION = 1_000_000
"""The rotations of MMBench's question n have the indices n + 1000000, n + 2000000, ..."""
_SEED_TYPES = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attributes",
    "Instance Location",
    "Instances Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Understanding",
)
"""SEEDBench's question types for images, by question_type_id from 1 (arXiv 2307.16125, table 1)."""
FORMULAS = "Handwritten Mathematical Expression Recognition"
_PARTS_OF_A_WHOLE = ("pope", "chartqa")
"""Benchmarks whose original JSON files are parts of one benchmark."""


def load_questions(
    benchmark: Benchmark,
    data: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    categories: Sequence[str] = (),
    limit: int | None = None,
) -> list[Question]:
    """Read the questions of a benchmark, in the order of its files.

    The id comes from the file; without one, it is the number of the row, from 1. Duplicate ids (MME's name the image)
    get the suffixes #2, #3, ...

    Args:
        data: The benchmark's file, or a folder with it.
        images: Folder of separate image files; by default the folder of the data.
        split: Part of the names of the files to read, such as validation.
        categories: Keep only questions of these categories.
        limit: Keep only the first questions; rotations of a choice, or the pair about an image, count as one.

    Raises:
        DataError: if there is no such file, or several that do not belong together; if a category is unknown; if a
            column or an answer is missing or wrong. The message names the row.
    """
    if not data.is_file() and not data.is_dir():
        raise DataError(f"`data` {data}: there is no such file or folder")
    paths = [data]
    if data.is_dir():
        found = sorted(path for path in data.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        paths = [path for path in found if split is None or split in path.stem]
        if not paths:
            what = f"with {split!r} in its name" if split else f"that ends in {', '.join(SUFFIXES)}"
            raise DataError(f"{data} holds no file {what}")
        # Shards of one table (test-00000-of-00002.parquet) are read in their order.
        tables = sorted({re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) for path in paths})
        is_whole = benchmark.name in _PARTS_OF_A_WHOLE and all(path.suffix in (".json", ".jsonl") for path in paths)
        if len(tables) > 1 and not is_whole:
            raise DataError(f"{data} holds {', '.join(tables[:8])}; choose one with `split`, or give the file")

    family = benchmark.family or benchmark.name
    folder = images or (data if data.is_dir() else data.parent)
    questions: list[Question] = []
    for path in paths:
        for row in read_rows(path, folder):
            question = _question(family, row, folder, len(questions) + 1)
            part = path.stem if len(paths) > 1 else ""
            questions += _with_boxes(question, row) if family == "refcoco" else [_refined(family, question, row, part)]
    counts: Counter[str] = Counter()
    for number, question in enumerate(questions):
        counts[question.id] += 1
        if counts[question.id] > 1:
            questions[number] = replace(question, id=f"{question.id}#{counts[question.id]}")

    known = list(dict.fromkeys(name for question in questions for name in question.categories))
    for category in categories:
        if category not in known:
            raise DataError(f"{data} has no question of the category {category!r}; known: {', '.join(known) or 'none'}")
    chosen = [item for item in questions if not categories or set(categories) & set(item.categories)]
    groups = [(bool(item.group), item.group or item.id) for item in chosen]
    kept = set(list(dict.fromkeys(groups))[:limit])
    return [item for item, group in zip(chosen, groups, strict=True) if group in kept]


def _question(family: str, row: Row, images: Path, number: int) -> Question:
    """Read the columns that all benchmarks have in common."""
    text = _required(row, _TEXTS)
    options: tuple[str, ...] = ()
    if row.cells.get("options"):
        options = tuple(listed(row.cells["options"]))
    else:
        for form, letters in (("{}", string.ascii_uppercase), ("choice_{}", string.ascii_lowercase)):
            found = [_present(row.cells.get(form.format(letter))) for letter in letters]
            options = options or tuple(takewhile(bool, found))

    truths: tuple[str, ...] = ()
    if family != "refcoco":  # its boxes are the truths
        cell = _required(row, _TRUTHS)
        answers = [] if cell is None else listed(cell, only_of_texts=family not in _WITH_LISTS)
        truths = tuple(answer.strip() for answer in answers)
        if not set(truths) - {"", "nan"}:
            raise DataError(f"{row.where} has no answer; is the file a test split, whose answers are not published?")
        if options:
            letters = string.ascii_uppercase[: len(options)]
            if len(truths) != 1 or len(truths[0]) != 1 or truths[0].upper() not in letters:
                raise DataError(f"{row.where}: the answer is {', '.join(truths)[:40]!r}, and the options are {letters}")
            truths = (truths[0].upper(),)

    columns = _CATEGORIES.get(family, ("category",))
    cells = [item for column in columns for item in listed(row.cells.get(column) or "")]
    parts = [part for cell in cells for part in (cell.split(",") if family in ("pope", "mmvet") else [cell])]
    return Question(
        id=str(next((row.cells[key] for key in _IDS if row.cells.get(key) not in (None, "")), number)),
        text=str(text).strip(),
        pictures=_pictures(row, images),
        truths=truths,
        options=options,
        hint=_present(row.cells.get("hint")),
        categories=tuple(dict.fromkeys(text for part in parts if (text := _present(part)))),
    )


def _required(row: Row, names: Sequence[str]) -> Any:
    name = next((name for name in names if name in row.cells), None)
    if name is None:
        columns = ", ".join(sorted(row.cells))
        raise DataError(f"{row.where} lacks the column {' or '.join(names)}; it has {columns}")
    return row.cells[name]


def _present(value: Any) -> str:
    """Return a cell's text, empty if there is none; files made with pandas write "nan" then."""
    text = "" if value is None else str(value).strip()
    return "" if text == "nan" else text


def _pictures(row: Row, images: Path) -> tuple[Picture, ...]:
    """Return the images in the file, column by column, or else the image files that the row names."""
    inside = tuple(picture for name in sorted(row.pictures) for picture in row.pictures[name])
    if inside:
        return inside
    for name in _IMAGES:
        if value := row.cells.get(name):
            suffix = ".jpg" if name == "image_id" else ""  # TextVQA gives the name without extension
            return tuple(PictureFile(find_image(images, item + suffix)) for item in listed(value))
    return (MissingPicture(f"{row.where}: no image"),)


def _refined(family: str, question: Question, row: Row, part: str) -> Question:
    """Add the special features of one benchmark. `part` is the file's name without extension if there are several
    files."""
    kind = part.split("_")[-1]  # of coco_pope_random, test_human
    match family:
        case "mmbench" | "seedbench" if not question.options:
            columns = "A, B, ..." if family == "mmbench" else "A, B, ... or choice_a, choice_b, ..."
            raise DataError(f"{row.where} has no options; a choice needs the columns {columns}")
        case "mmbench":
            is_index = question.id.isdecimal()
            return replace(question, group=str(int(question.id) % _ROTATION) if is_index else question.id)
        case "seedbench" if not question.categories:
            number = str(row.cells.get("question_type_id", ""))
            if number.isdecimal() and 1 <= int(number) <= len(_SEED_TYPES):
                question = replace(question, categories=(_SEED_TYPES[int(number) - 1],))
        case "mme":
            known = (*MME_PERCEPTION, *MME_COGNITION)
            if len(question.categories) != 1 or question.categories[0] not in known:
                raise DataError(
                    f"{row.where}: the category is {row.cells.get('category')!r}; MME has {', '.join(known)}"
                )
            # The pair about an image has one name, or else the same image.
            name = row.cells.get("question_id") or row.cells.get("image_path") or question.pictures[0]
            # The prompt template already asks for the form of the answer.
            text = question.text.replace("Please answer yes or no.", "").strip()
            return replace(_yes_or_no(question, row), text=text, group=f"{question.categories[0]}/{name}")
        case "pope":
            question = _yes_or_no(question, row)
            if part:
                question = replace(question, id=f"{kind}/{question.id}", categories=question.categories or (kind,))
        case "chartqa" if part and not question.categories:
            return replace(question, id=f"{part}/{question.id}", categories=(kind,))
        case "mmmu":
            # Keep the images that the text names (<image 1>, ...); the subject is in the id (validation_Art_1).
            written = "\n".join((question.text, *question.options))
            marks = sorted({int(number) for number in re.findall(r"<image (\d)>", written)})
            numbered = dict(enumerate(question.pictures, start=1))  # a list in one column
            numbered |= {mark: row.pictures[f"image_{mark}"][0] for mark in marks if row.pictures.get(f"image_{mark}")}
            if marks and set(marks) <= set(numbered):
                pictures = tuple(numbered[mark] for mark in marks)
                question = replace(question, pictures=pictures, details={"marks": tuple(marks)})
            subject = re.fullmatch(r"[a-z]+_(.+)_\d+", question.id)
            if not question.categories and subject:
                question = replace(question, categories=(subject[1],))
        case "realworldqa" if not question.options:  # in the Parquet layout the text has the options
            found = written_options(question.text)
            return replace(question, details={"written": found}) if found else question
        case "ocrbench":
            dataset = row.cells.get("dataset", row.cells.get("dataset_name"))
            is_formula = dataset == "HME100k" or FORMULAS in question.categories
            return replace(question, details={"is_formula": is_formula})
        case "textvqa" if len(question.truths) < 2:
            raise DataError(f"{row.where} has one answer; VQA accuracy needs those of several people, usually ten")
    return question


def _yes_or_no(question: Question, row: Row) -> Question:
    truth = question.truths[0].lower().rstrip(".")
    if truth not in ("yes", "no"):
        raise DataError(f"{row.where}: the answer is {question.truths[0]!r}; it must be yes or no")
    return replace(question, truths=(truth,))


def _with_boxes(question: Question, row: Row) -> list[Question]:
    """Read the box: x0, y0, x1, y1 in JSON lines; x, y, width, height in Parquet, with several expressions per box."""
    values = row.cells.get("bbox")
    if not isinstance(values, list) or len(values) != 4:
        raise DataError(f"{row.where} lacks the column bbox with four numbers; it has {', '.join(sorted(row.cells))}")
    x0, y0, *rest = _numbers(row, "bbox", values)
    x1, y1 = (x0 + rest[0], y0 + rest[1]) if row.pictures else rest
    if x1 <= x0 or y1 <= y0:
        raise DataError(f"{row.where}: the box {values} is empty; it must be x0, y0, x1, y1 in pixels")
    sides = [row.cells.get(name) for name in ("height", "width")]
    size = None if None in sides else tuple(_numbers(row, "height or width", sides))
    truth, details = f"[{x0:g}, {y0:g}, {x1:g}, {y1:g}]", {"box": (x0, y0, x1, y1), "size": size}
    expressions = listed(row.cells["answer"]) if row.pictures and row.cells.get("answer") else [question.text]
    return [replace(question, text=text.strip(), truths=(truth,), details=details) for text in expressions]


def _numbers(row: Row, column: str, values: Sequence[Any]) -> list[float]:
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise DataError(f"{row.where}: {column} must be numbers; got {values!r}"[:200])
    return found
