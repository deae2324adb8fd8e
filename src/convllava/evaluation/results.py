"""Results: answers become numbers with intervals, and two results can be compared."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from rich.table import Table

from convllava.errors import ConfigError, DataError, InputError
from convllava.evaluation.aggregate import Graded, groups_of, interval, mean_interval, rounded
from convllava.evaluation.benchmarks import BENCHMARKS, Benchmark
from convllava.evaluation.questions import Question
from convllava.evaluation.report import result_table
from convllava.evaluation.rules import Grade, GradingContext
from convllava.io import RESULT, parse_lines, read_json, write_json


class Answer(TypedDict):
    """A line of an answers file: the answer to a question, or the reason why it has no answer."""

    id: str
    answer: NotRequired[str]
    error: NotRequired[str]


class Result(Mapping[str, Any]):
    """The result of a benchmark: a mapping with the content of result.json. Shares are 0 to 1.

    benchmark, questions: The benchmark's name and the number of questions.
    primary, score, interval: The name of the main measure, its value, and the interval of 95 % of bootstrap draws.
    measures, categories: All measures, of all questions and by category.
    unparsed, missing, broken: Questions whose answer could not be read, that have no answer, or that could not be
        asked; they count as wrong. `broken` has objects with `id` and `reason`.
    unknown: Ids of answers that belong to no question.
    absent: Categories that the score sums up, but that have no questions here.
    units: The scores that a comparison pairs: objects with `id`, `categories`, `score`.
    model, versions, settings, prompts, efficiency, seconds: Only of a run, not of answers made elsewhere.
    tasks, overall, samples: Only of generated pages: accuracy, accuracy of blind answers, and number of questions.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = dict(content)

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def __repr__(self) -> str:
        return f"Result({self['benchmark']}: {self['primary']} {self.score} of {self['questions']} questions)"

    @property
    def score(self) -> float:
        """The main measure, which `primary` names."""
        return self.content["score"]

    def table(self) -> Table:
        """Return the measures by category as a table for the terminal."""
        return result_table(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the content as JSON. An existing file is replaced as a whole.

        Raises:
            InputError: if it cannot be written.
        """
        write_json(Path(path), self.content)


def read_answers(path: Path) -> list[Answer]:
    """Read answers made elsewhere: one line {"id": ..., "answer": text} per question.

    Raises:
        DataError: if there is no such file, a line is not such an object, or an id occurs twice; the message names
            the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`answers` {path} cannot be read: {error}") from None
    found: dict[str, Answer] = {}
    for where, content in parse_lines(text, path):
        answer = checked_answer(content, where)
        if answer["id"] in found:
            raise DataError(f"{where}: the id {answer['id']} already has an answer")
        found[answer["id"]] = answer
    return list(found.values())


def checked_answer(content: Any, where: str) -> Answer:
    """Return a line of an answers file with its id as text; raises DataError if it is malformed."""
    if not isinstance(content, dict) or "id" not in content or not isinstance(content["id"], str | int):
        raise DataError(f'{where} must be {{"id": index, "answer": text}}; got {str(content)[:60]!r}')
    if isinstance(content.get("error"), str):
        return {"id": str(content["id"]), "error": content["error"]}
    if not isinstance(content.get("answer"), str | int | float):
        raise DataError(f"{where}: the answer to {content['id']} must be text; got {content.get('answer')!r}"[:200])
    return {"id": str(content["id"]), "answer": str(content["answer"])}


def score_answers(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    context: GradingContext | None = None,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Grade answers by the benchmark's rule and sum up.

    Args:
        questions: All questions of the benchmark.
        answers: At most one per question.
        context: See `rules.GradingContext`.
        progress: Called with the share of graded questions, 0 to 1.

    Returns:
        The keys of `Result` from `benchmark` to `units`.

    Raises:
        InputError: if no answer belongs to a question, or if the benchmark needs an LLM judge and has none.
    """
    context = context or GradingContext()
    if benchmark.needs_judge and context.llm_judge is None:
        raise ConfigError(f"{benchmark.name} needs an LLM judge; give `judge_url` and `judge_model`")
    given, known = {answer["id"]: answer for answer in answers}, {question.id for question in questions}
    unknown = [name for name in given if name not in known]
    if given and len(unknown) == len(given):
        raise DataError(
            f"none of the {len(given)} answers belongs to a question of {benchmark.name}: the first has the id "
            f"{unknown[0]!r}, the first question {questions[0].id!r}"
        )

    graded, broken = [], []
    for number, question in enumerate(questions, start=1):
        grade, answer = Grade(0.0, None), given.get(question.id)
        if answer is not None and "error" in answer:
            broken.append({"id": question.id, "reason": answer["error"]})
        elif answer is not None:
            try:
                grade = benchmark.rule(question, answer["answer"], context)
            except InputError as error:
                if benchmark.needs_judge:
                    raise
                broken.append({"id": question.id, "reason": str(error)})
        graded.append(Graded(question.id, question.categories, question.group, question.truths[0], *grade))
        progress(number / len(questions))

    groups = groups_of(graded)
    measures = benchmark.summarise(groups)
    low, high = interval(
        lambda drawn: benchmark.summarise([groups[index] for index in drawn])[benchmark.primary],
        [" ".join(group[0].categories) if benchmark.parts else "" for group in groups],
    )
    by_category: dict[str, list[Graded]] = defaultdict(list)
    for item in graded:
        for category in item.categories:
            by_category[category].append(item)
    missing = [question.id for question in questions if question.id not in given]
    failed = {*missing, *(item["id"] for item in broken)}
    return {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "primary": benchmark.primary,
        "score": rounded(measures[benchmark.primary]),
        "interval": [rounded(low), rounded(high)],
        "measures": {name: rounded(value) for name, value in measures.items()},
        "categories": {
            category: {"n": len(items)}
            | {name: rounded(value) for name, value in benchmark.summarise(groups_of(items)).items()}
            for category, items in sorted(by_category.items())
        },
        "unparsed": [item.id for item in graded if item.parsed is None and item.id not in failed],
        "missing": missing,
        "unknown": unknown,
        "broken": broken,
        "absent": [part for part in benchmark.parts if part not in by_category],
        "units": [
            {"id": item.id, "categories": list(item.categories), "score": rounded(item.score)}
            for item in benchmark.units(groups)
        ],
    }


def read_result(path: str | os.PathLike[str]) -> Result:
    """Read a result by its file, or by the folder into which a run wrote it.

    Raises:
        DataError: if it does not exist or is malformed.
    """

    file = Path(path) / RESULT if Path(path).is_dir() else Path(path)
    content = read_json(file)
    for key in ("benchmark", "primary", "score", "units"):
        if key not in content:
            raise DataError(f"{file} lacks {key!r}; give a {RESULT} of convllava eval, or its folder")
    if not isinstance(content["score"], int | float):
        raise DataError(f"{file}: the score must be a number; give a {RESULT} as convllava eval writes it")
    for number, unit in enumerate(content["units"] if isinstance(content["units"], list) else [None], start=1):
        match unit:
            case {"id": str(), "categories": [*names], "score": int() | float()} if {*map(type, names)} <= {str}:
                continue
        raise DataError(f"{file}: unit {number} lacks an id, categories or a score; run the evaluation again")
    if content["benchmark"] in BENCHMARKS["generated"].aliases:  # its name in older results
        content["benchmark"] = "generated"
    return Result(content)


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str], *, seed: int = 0) -> dict[str, Any]:
    """Return how much better B is than A, by category and overall.

    Each question has one score (in MMBench, each question with all its rotations), so the difference is a difference of
    accuracies even if a benchmark reports another number. The interval comes from a paired bootstrap.

    Args:
        a, b: Results of one benchmark: files or folders.

    Returns:
        `benchmark`, the paths `a` and `b`, `overall`, and `categories` by name. The last two have `n`, the mean scores
        `a` and `b`, the `difference` b - a, and its `interval`.

    Raises:
        DataError: if the results are of different benchmarks or questions, or are malformed.
    """
    first, second = read_result(a), read_result(b)
    if first["benchmark"] != second["benchmark"]:
        raise DataError(f"{a} is of {first['benchmark']} and {b} of {second['benchmark']}; compare one benchmark")
    units_a, units_b = ({unit["id"]: unit for unit in result["units"]} for result in (first, second))
    if only := sorted(set(units_a) ^ set(units_b)):
        raise DataError(
            f"{a} and {b} have different questions: {len(only)} are in only one of them, such as {only[0]}; "
            "use the same `limit`, `split` and `categories`"
        )
    if not units_a:
        raise DataError(f"{a} and {b} have no units, so there is nothing to compare; run the evaluation again")

    def difference(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
        differences = [b - a for a, b in pairs]
        low, high = mean_interval(differences, seed=seed)
        return {
            "n": len(pairs),
            "a": rounded(sum(a for a, _ in pairs) / len(pairs)),
            "b": rounded(sum(b for _, b in pairs) / len(pairs)),
            "difference": rounded(sum(differences) / len(pairs)),
            "interval": [rounded(low), rounded(high)],
        }

    by_category: dict[str, list[tuple[float, float]]] = defaultdict(list)
    pairs = [(unit["score"], units_b[name]["score"]) for name, unit in units_a.items()]
    for unit, pair in zip(units_a.values(), pairs, strict=True):
        for category in set(unit["categories"]):
            by_category[category].append(pair)
    return {
        "benchmark": first["benchmark"],
        "a": str(a),
        "b": str(b),
        "overall": difference(pairs),
        "categories": {name: difference(part) for name, part in sorted(by_category.items())},
    }
