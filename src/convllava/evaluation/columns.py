"""Rows of a benchmark's file as questions: which columns say what, and what is particular to one benchmark.

Columns go by the names that VLMEvalKit's TSV files, the lmms-lab Parquet files and the benchmarks' own JSON files have.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convllava.errors import InputError
from convllava.evaluation.answer_parsing import written_options
from convllava.evaluation.questions import NoPicture, Picture, PictureFile, Question
from convllava.evaluation.readers.rows import Row, find_image, listed
from convllava.evaluation.readers.tables import read_rows

_IDS = ("index", "id", "questionId", "question_id", "data_id")
_TEXTS = ("question", "text", "query", "sent", "expression")
_TRUTHS = ("answers", "answer", "label")
_LITERALS = ("docvqa", "infovqa", "textvqa", "ocrbench", "mmmu")
"""Families whose TSV files hold lists of right answers; elsewhere one in brackets, as ChartQA's "[8, 3]", is one."""
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
"""Columns that say what a question counts for; of all others `category`."""
_ROTATION = 1_000_000
"""MMBench's rotations of question n have the indices n + 1000000, n + 2000000, ..."""
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
"""Of SEEDBench's images, by question_type_id from 1 on (arXiv 2307.16125, table 1)."""
MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
FORMULAS = "Handwritten Mathematical Expression Recognition"


def read_questions(family: str, paths: Sequence[Path], images: Path) -> list[Question]:
    """The questions of a benchmark's files, in their order.

    An id is that of the file; rows without one go by their number, from 1 on. Ids that come again (MME's name the
    image) get #2, #3, ... behind them.

    Args:
        family: One of the names of `benchmarks.BENCHMARKS`; refcoco for its relatives too.
        paths: The files, with several splits of POPE or ChartQA one each.
        images: Folder of images that lie in files of their own.

    Raises:
        InputError: a column or an answer is missing, or a row contradicts the benchmark; the line names the row.
    """
    found: list[Question] = []
    for path in paths:
        for row in read_rows(path, images):
            question = _question(family, row, images, len(found) + 1)
            refine = _REFINEMENTS.get(family)
            found += refine(question, row, path if len(paths) > 1 else None) if refine else [question]
    return _unique(found)


def _unique(questions: list[Question]) -> list[Question]:
    seen: Counter[str] = Counter()
    unique = []
    for question in questions:
        seen[question.id] += 1
        count = seen[question.id]
        unique.append(question if count == 1 else replace(question, id=f"{question.id}#{count}"))
    return unique


def _question(family: str, row: Row, images: Path, number: int) -> Question:
    """What all benchmarks have in common."""
    text = _required(row, _TEXTS)
    options = _options(row)
    name = next((row.cells[key] for key in _IDS if row.cells.get(key) not in (None, "")), number)
    return Question(
        id=str(name),
        text=str(text).strip(),
        pictures=_pictures(row, images),
        truths=() if family == "refcoco" else _truths(family, row, options),
        options=options,
        hint=_present(row.cells.get("hint")),
        categories=_categories(family, row),
    )


def _required(row: Row, names: Sequence[str]) -> Any:
    name = next((name for name in names if name in row.cells), None)
    if name is None:
        columns = ", ".join(sorted(row.cells))
        raise InputError(f"{row.where} lacks the column {' or '.join(names)}; it has {columns}")
    return row.cells[name]


def _present(value: Any) -> str:
    """A cell's text; files made with pandas write an absent one as "nan"."""
    text = "" if value is None else str(value).strip()
    return "" if text == "nan" else text


def _options(row: Row) -> tuple[str, ...]:
    """Columns A, B, ..., or choice_a, choice_b, ..., or a list under `options`."""
    if row.cells.get("options"):
        return tuple(listed(row.cells["options"]))
    for form in ("{}", "choice_{}"):
        letters = string.ascii_uppercase if form == "{}" else string.ascii_lowercase
        found = [_present(row.cells.get(form.format(letter))) for letter in letters]
        if found[0]:
            return tuple(found[: found.index("")])
    return ()


def _truths(family: str, row: Row, options: tuple[str, ...]) -> tuple[str, ...]:
    cell = _required(row, _TRUTHS)
    cells = [] if cell is None else listed(cell, only_of_texts=family not in _LITERALS)
    truths = tuple(truth.strip() for truth in cells)
    if not set(truths) - {"", "nan"}:
        raise InputError(f"{row.where} has no answer; is the file a test split, whose answers are not published?")
    if not options:
        return truths
    letters = string.ascii_uppercase[: len(options)]
    if len(truths) != 1 or len(truths[0]) != 1 or truths[0].upper() not in letters:
        raise InputError(f"{row.where}: the answer is {', '.join(truths)[:40]!r}, and the options are {letters}")
    return (truths[0].upper(),)


def _pictures(row: Row, images: Path) -> tuple[Picture, ...]:
    """Those in the file, column by column, else those in the files that the row names."""
    held = tuple(picture for name in sorted(row.pictures) for picture in row.pictures[name])
    if held:
        return held
    for name in _IMAGES:
        if value := row.cells.get(name):
            ending = ".jpg" if name == "image_id" else ""  # TextVQA names its images so
            return tuple(PictureFile(find_image(images, item + ending)) for item in listed(value))
    return (NoPicture(f"{row.where}: no image"),)


def _categories(family: str, row: Row) -> tuple[str, ...]:
    names = _CATEGORIES.get(family, ("category",))
    cells = [item for name in names for item in listed(row.cells.get(name) or "")]
    parts = [part for cell in cells for part in (cell.split(",") if family in ("pope", "mmvet") else [cell])]
    return tuple(dict.fromkeys(text for part in parts if (text := _present(part))))


def _with_rotations(question: Question, row: Row, path: Path | None) -> list[Question]:
    if not question.options:
        raise InputError(f"{row.where} has no options; a choice needs the columns A, B, ...")
    index = int(question.id) if question.id.isdecimal() else None
    return [replace(question, group=question.id if index is None else str(index % _ROTATION))]


def _of_seedbench(question: Question, row: Row, path: Path | None) -> list[Question]:
    if not question.options:
        raise InputError(f"{row.where} has no options; a choice needs the columns A, B, ... or choice_a, choice_b, ...")
    kind = str(row.cells.get("question_type_id", ""))
    if question.categories or not kind.isdecimal() or not 1 <= int(kind) <= len(_SEED_TYPES):
        return [question]
    return [replace(question, categories=(_SEED_TYPES[int(kind) - 1],))]


def _of_mme(question: Question, row: Row, path: Path | None) -> list[Question]:
    """The pair of questions about an image goes by the image's name, or else by the image."""
    known = (*MME_PERCEPTION, *MME_COGNITION)
    if len(question.categories) != 1 or question.categories[0] not in known:
        raise InputError(f"{row.where}: the category is {row.cells.get('category')!r}; MME has {', '.join(known)}")
    name = row.cells.get("question_id") or row.cells.get("image_path") or question.pictures[0]
    group = f"{question.categories[0]}/{name}"
    return [replace(_yes_or_no(question, row), text=_bare(question.text), group=group)]


def _bare(text: str) -> str:
    """Without MME's own request for the form of the answer, in whose place the prompt's stands."""
    return text.replace("Please answer yes or no.", "").strip()


def _of_pope(question: Question, row: Row, path: Path | None) -> list[Question]:
    """Of a folder with a file for each kind of question, the file's name says which (coco_pope_random.json)."""
    question = _yes_or_no(question, row)
    if path is None:
        return [question]
    kind = path.stem.split("_")[-1]
    return [replace(question, id=f"{kind}/{question.id}", categories=question.categories or (kind,))]


def _yes_or_no(question: Question, row: Row) -> Question:
    truth = question.truths[0].lower().rstrip(".")
    if truth not in ("yes", "no"):
        raise InputError(f"{row.where}: the answer is {question.truths[0]!r}; it must be yes or no")
    return replace(question, truths=(truth,))


def _of_mmmu(question: Question, row: Row, path: Path | None) -> list[Question]:
    """Images stand where the text has <image 1>, <image 2>, ...; the subject is in the id (validation_Art_1)."""
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
    return [question]


def _of_realworldqa(question: Question, row: Row, path: Path | None) -> list[Question]:
    """In the Parquet layout the options stand in the question's text."""
    found = () if question.options else written_options(question.text)
    return [replace(question, details={"written": found})] if found else [question]


def _of_chartqa(question: Question, row: Row, path: Path | None) -> list[Question]:
    """Of the original files test_human.json and test_augmented.json the name says which half a question is of."""
    if path is None or question.categories:
        return [question]
    return [replace(question, id=f"{path.stem}/{question.id}", categories=(path.stem.split("_")[-1],))]


def _of_ocrbench(question: Question, row: Row, path: Path | None) -> list[Question]:
    dataset = row.cells.get("dataset", row.cells.get("dataset_name"))
    return [replace(question, details={"is_formula": dataset == "HME100k" or FORMULAS in question.categories})]


def _of_textvqa(question: Question, row: Row, path: Path | None) -> list[Question]:
    if len(question.truths) < 2:
        raise InputError(
            f"{row.where} has one answer; VQA accuracy compares with those of several people, ten as a rule"
        )
    return [question]


def _of_refcoco(question: Question, row: Row, path: Path | None) -> list[Question]:
    """JSON lines have x0, y0, x1, y1; Parquet has COCO's x, y, width, height, and several expressions for each box."""
    values = row.cells.get("bbox")
    if not isinstance(values, list) or len(values) != 4:
        raise InputError(f"{row.where} lacks the column bbox with four numbers; it has {', '.join(sorted(row.cells))}")
    x0, y0, *rest = _numbers(row, "bbox", values)
    x1, y1 = (x0 + rest[0], y0 + rest[1]) if row.pictures else rest
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"{row.where}: the box {values} is empty; it must be x0, y0, x1, y1 in pixels")
    sides = [row.cells.get(name) for name in ("height", "width")]
    size = None if None in sides else tuple(_numbers(row, "height or width", sides))
    question = replace(question, truths=(f"[{x0:g}, {y0:g}, {x1:g}, {y1:g}]",))
    question = replace(question, details={"box": (x0, y0, x1, y1), "size": size})
    expressions = listed(row.cells["answer"]) if row.pictures and row.cells.get("answer") else [question.text]
    return [replace(question, text=expression.strip()) for expression in expressions]


def _numbers(row: Row, column: str, values: Sequence[Any]) -> list[float]:
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise InputError(f"{row.where}: {column} must be numbers; got {values!r}"[:200])
    return found


_REFINEMENTS: dict[str, Callable[[Question, Row, Path | None], list[Question]]] = {
    "mmbench": _with_rotations,
    "seedbench": _of_seedbench,
    "mme": _of_mme,
    "pope": _of_pope,
    "mmmu": _of_mmmu,
    "realworldqa": _of_realworldqa,
    "chartqa": _of_chartqa,
    "ocrbench": _of_ocrbench,
    "textvqa": _of_textvqa,
    "refcoco": _of_refcoco,
}
