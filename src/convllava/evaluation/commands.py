"""What the commands of `convllava eval` do, for Python callers as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from convllava import checkpoints
from convllava.errors import InputError
from convllava.evaluation.benchmarks import benchmark_named
from convllava.evaluation.llm_judge import ChatJudge
from convllava.evaluation.questions import Question
from convllava.evaluation.readers.sources import find_benchmarks
from convllava.evaluation.report import pairs_table, tables_of
from convllava.evaluation.results import Result, read_answers
from convllava.evaluation.results import score as score_answers
from convllava.evaluation.rules import Aids, Judge
from convllava.evaluation.runner import Options, check_options, chosen_questions, questions_of, run, run_questions
from convllava.evaluation.synthetic import SYNTHETIC, as_report, describe_world, world_questions
from convllava.evaluation.synthetic_report import table_of
from convllava.inference import load
from convllava.synthetic import World


def judge_at(url: str | None, model: str | None) -> Judge | None:
    """The judge that two options name; InputError where one of them is missing."""
    if (url is None) != (model is None):
        raise InputError("--judge-url and --judge-model go together: the server, and the model there that judges")
    return None if url is None or model is None else ChatJudge(url, model)


def run_files(
    name: str, model: str, pixels: Mapping[str, Any], data: Path, options: Options, output: Path | None
) -> dict[str, Any]:
    """Run a benchmark on files; with the name all, each that a folder holds.

    Returns:
        `running.run`'s report; of all, `benchmarks` with a report each, and `refused` with the reasons of the others.

    Raises:
        InputError: as `running.run`; of all, where nothing could be run.
    """
    if name != "all":
        return run(benchmark_named(name), model, lambda: load(model, pixels=pixels), data, options, output)
    ready, refused = _ready(find_benchmarks(data), options)
    if not ready:
        raise InputError("; ".join(refused.values()))
    assistant = load(model, pixels=pixels)
    reports = {}
    for each, (path, questions) in ready.items():
        folder, source = None if output is None else output / each, {"data": str(path)}
        reports[each] = run_questions(benchmark_named(each), model, assistant, questions, options, folder, source)
    return {"benchmarks": reports, "refused": refused}


def _ready(
    found: Mapping[str, Path], options: Options
) -> tuple[dict[str, tuple[Path, list[Question]]], dict[str, str]]:
    """The benchmarks that can be run, with their files and questions, and the reasons why others cannot."""
    ready, refused = {}, {}
    for name, path in found.items():
        try:
            ready[name] = path, questions_of(benchmark_named(name), path, options)
        except InputError as error:
            refused[name] = str(error)
    return ready, refused


def run_synthetic(
    model: str, pixels: Mapping[str, Any], world: World, samples: int, options: Options, output: Path | None
) -> dict[str, Any]:
    """Run the generated world as a benchmark: `running.run`'s report together with that of `synthetic.evaluate`.

    Raises:
        InputError: as `running.run`; or choices by likelihood, of which the world's questions have none.
    """
    check_options(SYNTHETIC, options)
    if options.choices != "generate":
        raise InputError(
            f"--choices {options.choices} has no effect on the generated world, whose questions have no options; "
            "leave it out, or name a benchmark with --benchmark"
        )
    questions = world_questions(world, samples)
    source = {"world": describe_world(world), "samples": samples}
    report = run_questions(SYNTHETIC, model, load(model, pixels=pixels), questions, options, output, source)
    return report | as_report(report, samples)


def score_file(
    name: str, data: Path, answers: Path, options: Options, model: str | None, judge: Judge | None
) -> Result:
    """Score a file of answers; `model` is whose image geometry their boxes are in."""
    benchmark = benchmark_named(name)
    given = read_answers(answers)
    questions = chosen_questions(benchmark, data, options)
    placement = None if model is None else checkpoints.processor(checkpoints.find(model)).image_processor.placement
    return score_answers(benchmark, questions, given, Aids(placement, judge), seed=options.seed)


def tables_of_all(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """Any of the reports for the terminal."""
    if "benchmarks" in result:
        for report in result["benchmarks"].values():
            yield from tables_of(report)
        yield from (f"{name} was not run: {reason}" for name, reason in result["refused"].items())
        return
    if "tasks" in result:
        # A report of the generated world is a result with the keys of `synthetic.Report` beside its own.
        yield table_of(result, f"{result['model']['name']} on {result['samples']} held-out pages")  # type: ignore[arg-type]
    else:
        yield from tables_of(result)
    if result["efficiency"]:
        yield pairs_table("efficiency, medians of single questions", result["efficiency"])
