"""A benchmark from beginning to end: answers, their scores, what they cost, and what one needs to do it again."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import convllava
from convllava import checkpoints
from convllava.checkpoints.tensors import weights_digest
from convllava.display import progress_bar
from convllava.errors import InputError
from convllava.evaluation.answering import CHOICES, Asking, answer_all
from convllava.evaluation.benchmarks import Benchmark
from convllava.evaluation.efficiency import measure
from convllava.evaluation.prompts import check_template, templates_of
from convllava.evaluation.questions import Question
from convllava.evaluation.readers.sources import load_questions
from convllava.evaluation.results import Result, checked_answer, score
from convllava.evaluation.rules import Aids, Judge
from convllava.inference import Assistant
from convllava.io import JUDGEMENTS, RESULT, WEIGHTS, ResumableJsonl, write_json

TIMED = 5
"""Questions that are asked once more, one by one, for the measurement of time."""


@dataclass(frozen=True)
class Options:
    """What a run may set.

    Attributes:
        images, split, categories, limit: See `sources.load_questions`.
        prompt: A form of words in place of the benchmark's, with `{question}`, and perhaps `{options}` and `{hint}`.
        max_new_tokens: Longest answer; None takes the benchmark's.
        choices: `generate` or `likelihood`.
        batch_size: Questions that are answered together.
        timed: Questions that are timed; 0 leaves efficiency out.
        seed: Of the bootstrap.
        judge: Scores free answers; its model is part of the settings.
    """

    images: Path | None = None
    split: str | None = None
    categories: tuple[str, ...] = ()
    limit: int | None = None
    prompt: str | None = None
    max_new_tokens: int | None = None
    choices: str = "generate"
    batch_size: int = 16
    timed: int = TIMED
    seed: int = 0
    judge: Judge | None = field(default=None, compare=False)


def run(
    benchmark: Benchmark,
    model: str,
    load: Callable[[], Assistant],
    data: Path,
    options: Options,
    output: Path | None = None,
) -> dict[str, Any]:
    """Answer a benchmark's questions and score the answers.

    Args:
        benchmark: Which.
        model: What the assistant is loaded from.
        load: Who answers; called once the questions are read, since that may take long and be refused.
        data: See `sources.load_questions`.
        options: Settings.
        output: Folder for answers.jsonl, to which a killed run adds, settings.json and result.json.

    Returns:
        A `scoring.Result` with model, recipe, versions, settings, prompts, efficiency and seconds.

    Raises:
        InputError: files, options or the output folder are not as they must be.
    """
    questions = questions_of(benchmark, data, options)
    return run_questions(benchmark, model, load(), questions, options, output, {"data": str(data)})


def questions_of(benchmark: Benchmark, data: Path, options: Options) -> list[Question]:
    """The questions of a run, once all that could stop it later has been looked at; no model is needed.

    Raises:
        InputError: as `run`.
    """
    check_options(benchmark, options)
    return chosen_questions(benchmark, data, options)


def check_options(benchmark: Benchmark, options: Options) -> None:
    """Raise `InputError` for options that a benchmark cannot be run with."""
    if benchmark.needs_judge and options.judge is None:
        raise InputError(f"{benchmark.name} needs a judge; name one with --judge-url and --judge-model")
    if options.choices not in CHOICES:
        raise InputError(f"--choices is {options.choices!r}; choose one of {', '.join(CHOICES)}")
    _asking(benchmark, options)


def chosen_questions(benchmark: Benchmark, data: Path, options: Options) -> list[Question]:
    """`sources.load_questions` with the options' choice of them."""
    return load_questions(
        benchmark,
        data,
        images=options.images,
        split=options.split,
        categories=options.categories,
        limit=options.limit,
    )


def run_questions(
    benchmark: Benchmark,
    model: str,
    assistant: Assistant,
    questions: Sequence[Question],
    options: Options,
    output: Path | None,
    source: dict[str, Any],
) -> dict[str, Any]:
    """`run` on questions that are there already; `source` is what they came from, for the settings."""
    asking = _asking(benchmark, options)
    settings = _settings(benchmark, model, assistant, asking, options) | source | {"questions": _digest(questions)}
    journal, started = ResumableJsonl(output, settings), time.monotonic()
    with progress_bar(benchmark.name) as progress:
        answer_all(assistant, questions, asking, journal, progress)
    seconds = round(time.monotonic() - started, 1)
    report = {
        **_scored(benchmark, assistant, questions, journal, options, ResumableJsonl(output, settings, JUDGEMENTS)),
        "model": describe(model, assistant),
        "versions": versions(),
        "settings": settings,
        "prompts": asking.templates,
        "efficiency": measure(assistant, questions[: options.timed], asking) if options.timed else None,
        "seconds": seconds,
    }
    if output is not None:
        write_json(output / RESULT, report)
    return report


def _scored(
    benchmark: Benchmark,
    assistant: Assistant,
    questions: Sequence[Question],
    answers: ResumableJsonl,
    options: Options,
    judgements: ResumableJsonl,
) -> Result:
    judge = remembered(options.judge, judgements) if options.judge else None
    aids = Aids(assistant.processor.image_processor.placement, judge)
    given = [checked_answer(entry, "an answer") for entry in answers.entries.values()]
    with progress_bar("scoring") as progress:
        return score(benchmark, questions, given, aids, seed=options.seed, progress=progress)


def remembered(judge: Judge, journal: ResumableJsonl) -> Judge:
    """The judge, asked once about the same question, truth and answer: so that a killed run continues."""

    def judged(question: str, truth: str, answer: str) -> float | None:
        name = hashlib.blake2b("\0".join((question, truth, answer)).encode(), digest_size=16).hexdigest()
        if name not in journal.entries:
            journal.add([{"id": name, "score": judge(question, truth, answer)}])
        return journal.entries[name]["score"]

    return judged


def _asking(benchmark: Benchmark, options: Options) -> Asking:
    template = check_template(options.prompt) if options.prompt else None
    longest = options.max_new_tokens or benchmark.max_new_tokens
    return Asking(templates_of(benchmark, template), longest, options.choices, options.batch_size)


def _settings(
    benchmark: Benchmark, model: str, assistant: Assistant, asking: Asking, options: Options
) -> dict[str, Any]:
    """All that the answers depend on."""
    pixels = assistant.processor.image_processor
    return {
        "benchmark": benchmark.name,
        "model": model,
        WEIGHTS: weights_digest(assistant.model),
        "images": None if options.images is None else str(options.images),
        "split": options.split,
        "categories": list(options.categories),
        "limit": options.limit,
        "templates": asking.templates,
        "max_new_tokens": asking.max_new_tokens,
        "choices": asking.choices,
        "batch_size": asking.batch_size,
        "judge": getattr(options.judge, "model", None),
        "dtype": str(assistant.model.dtype).removeprefix("torch."),
        "pixels": {name: getattr(pixels, name) for name in ("mode", "side", "min_pixels", "max_pixels")},
    }


def _digest(questions: Sequence[Question]) -> str:
    """Of ids, texts and options: the same file may have changed under its name."""
    content = "\n".join(repr((item.id, item.text, item.options)) for item in questions)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def describe(model: str, assistant: Assistant) -> dict[str, Any]:
    """A model by name, the parameters of its parts, and the recipe that its folder has."""
    parts = assistant.model.model
    modules = {"tower": parts.vision_tower, "projector": parts.multi_modal_projector, "language": parts.language_model}
    recipe = Path(checkpoints.find(model)) / "recipe.yaml"
    return {
        "name": model,
        "parameters": {name: sum(weight.numel() for weight in module.parameters()) for name, module in modules.items()},
        "recipe": yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
    }


def versions() -> dict[str, str | None]:
    """Of the package and what computes, and the commit where the package lies in a repository."""
    import torch
    import transformers

    return {
        "convllava": convllava.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _commit() -> str | None:
    home = Path(__file__).parents[3]
    if not (home / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=home,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
