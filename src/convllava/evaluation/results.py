"""Answers to a benchmark's questions as a result: numbers, their intervals, and all that went wrong by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from convllava.errors import InputError
from convllava.evaluation.aggregate import Judged, groups_of
from convllava.evaluation.benchmarks import Benchmark
from convllava.evaluation.intervals import interval, mean_interval
from convllava.evaluation.questions import Question
from convllava.evaluation.rules import Aids, Verdict
from convllava.io import parse_lines


class Answer(TypedDict):
    """A line of an answers file: the answer to a question, or why there is none."""

    id: str
    answer: NotRequired[str]
    error: NotRequired[str]


class Broken(TypedDict):
    """A question that could not be asked, and why; it counts as wrong."""

    id: str
    reason: str


class Unit(TypedDict):
    """What a comparison pairs: a question, or a question with all its rotations."""

    id: str
    categories: list[str]
    score: float


class Result(TypedDict):
    """What a benchmark found. Shares are 0 to 1.

    `score` is the measure that `primary` names, with the `interval` that 95 % of bootstrap draws fall in. `unparsed`,
    `missing` and `broken` questions count as wrong; `unknown` are ids of answers to no question; `absent` are
    categories that the score is a sum of and that the file has no question of.
    """

    benchmark: str
    questions: int
    primary: str
    score: float
    interval: list[float]
    measures: dict[str, float]
    categories: dict[str, dict[str, float]]
    unparsed: list[str]
    missing: list[str]
    unknown: list[str]
    broken: list[Broken]
    absent: list[str]
    units: list[Unit]


def read_answers(path: Path) -> list[Answer]:
    """Answers made elsewhere: a line {"id": ..., "answer": text} for each question.

    Raises:
        InputError: no such file, a line that is no such object, or an id that comes twice; the message has the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    found: dict[str, Answer] = {}
    for where, content in parse_lines(text, path):
        answer = checked_answer(content, where)
        if answer["id"] in found:
            raise InputError(f"{where}: the id {answer['id']} has an answer already")
        found[answer["id"]] = answer
    return list(found.values())


def checked_answer(content: Any, where: str) -> Answer:
    """A line of an answers file as it must be, the id as text; InputError tells where it stands."""
    if not isinstance(content, dict) or "id" not in content or not isinstance(content["id"], str | int):
        raise InputError(f'{where} must be {{"id": index, "answer": text}}; got {str(content)[:60]!r}')
    if isinstance(content.get("error"), str):
        return {"id": str(content["id"]), "error": content["error"]}
    if not isinstance(content.get("answer"), str | int | float):
        raise InputError(f"{where}: the answer to {content['id']} must be text; got {content.get('answer')!r}"[:200])
    return {"id": str(content["id"]), "answer": str(content["answer"])}


def score(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    aids: Aids | None = None,
    *,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Result:
    """Judge answers by the benchmark's rule; `progress` is called with the share of questions judged.

    Raises:
        InputError: none of the answers is to one of the questions, or the benchmark needs a judge and has none.
    """
    aids = aids or Aids()
    if benchmark.needs_judge and aids.judge is None:
        raise InputError(f"{benchmark.name} needs a judge; name one with --judge-url and --judge-model")
    given, unknown = _matched(benchmark, questions, answers)
    judged, broken = _judged(benchmark, questions, given, aids, progress)
    missing = [question.id for question in questions if question.id not in given]
    failed = {*missing, *(item["id"] for item in broken)}
    return {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "primary": benchmark.primary,
        **_numbers(benchmark, judged, seed),  # type: ignore[typeddict-item]  # three of the keys
        "categories": by_category(benchmark, judged),
        "unparsed": [item.id for item in judged if item.parsed is None and item.id not in failed],
        "missing": missing,
        "unknown": unknown,
        "broken": broken,
        "absent": [part for part in benchmark.parts if not any(part in item.categories for item in judged)],
        "units": [
            Unit(id=item.id, categories=list(item.categories), score=rounded(item.score))
            for item in benchmark.units(groups_of(judged))
        ],
    }


def _matched(
    benchmark: Benchmark, questions: Sequence[Question], answers: Sequence[Answer]
) -> tuple[dict[str, Answer], list[str]]:
    """The answers by id, and the ids that no question has."""
    given, known = {answer["id"]: answer for answer in answers}, {question.id for question in questions}
    unknown = [name for name in given if name not in known]
    if given and len(unknown) == len(given):
        raise InputError(
            f"none of the {len(given)} answers is to a question of {benchmark.name}: the first is to {unknown[0]!r}, "
            f"and the first question is {questions[0].id!r}"
        )
    return given, unknown


def _judged(
    benchmark: Benchmark,
    questions: Sequence[Question],
    given: Mapping[str, Answer],
    aids: Aids,
    progress: Callable[[float], None],
) -> tuple[list[Judged], list[Broken]]:
    judged, broken = [], []
    for number, question in enumerate(questions, start=1):
        verdict = Verdict(0.0, None)
        answer = given.get(question.id, {"id": question.id})
        try:
            if "error" in answer:
                raise InputError(answer["error"])
            if "answer" in answer:
                verdict = benchmark.rule(question, answer["answer"], aids)
        except InputError as error:
            if benchmark.needs_judge and "error" not in answer:
                raise
            broken.append(Broken(id=question.id, reason=str(error)))
        judged.append(Judged(question.id, question.categories, question.group, question.truths[0], *verdict))
        progress(number / len(questions))
    return judged, broken


def _numbers(benchmark: Benchmark, judged: Sequence[Judged], seed: int) -> dict[str, Any]:
    """The measures, the primary one alone, and its interval over groups of questions drawn again."""
    groups = groups_of(judged)
    measures = benchmark.summarise(groups)
    low, high = interval(
        lambda drawn: benchmark.summarise([groups[index] for index in drawn])[benchmark.primary],
        [" ".join(group[0].categories) if benchmark.parts else "" for group in groups],
        seed=seed,
    )
    return {
        "score": rounded(measures[benchmark.primary]),
        "interval": [rounded(low), rounded(high)],
        "measures": {name: rounded(value) for name, value in measures.items()},
    }


def by_category(benchmark: Benchmark, judged: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """The measures of each category's questions, and how many (`n`), by the categories' names."""
    parts: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        for category in item.categories:
            parts[category].append(item)
    return {
        category: {"n": len(items)}
        | {name: rounded(value) for name, value in benchmark.summarise(groups_of(items)).items()}
        for category, items in sorted(parts.items())
    }


def accuracy_of(hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits, of how many (`n`), and the interval that 95 % of bootstrap draws fall in, `low` to `high`."""
    low, high = mean_interval([float(hit) for hit in hits])
    return {"n": len(hits), "accuracy": rounded(sum(hits) / len(hits)), "low": rounded(low), "high": rounded(high)}


def rounded(value: float) -> float:
    """Four places: a tenth of a thousandth is below what any benchmark can tell."""
    return round(value, 4)
