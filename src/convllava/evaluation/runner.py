"""Run a benchmark: answers, their scores, their cost, and everything that is needed to repeat the run."""

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import convllava
from convllava import checkpoints
from convllava.checkpoints.tensors import weights_digest
from convllava.display import progress_bar
from convllava.errors import ConfigError, InputError
from convllava.evaluation import metrics, rules
from convllava.evaluation.benchmarks import benchmark_named, find_benchmarks
from convllava.evaluation.columns import load_questions
from convllava.evaluation.efficiency import measure_efficiency
from convllava.evaluation.llm_judge import ChatJudge
from convllava.evaluation.questions import Picture, Question, conversation
from convllava.evaluation.results import Result, checked_answer, read_answers, score_answers
from convllava.evaluation.rules import GradingContext, LLMJudge
from convllava.evaluation.synthetic import by_task, describe_world, generated_questions
from convllava.inference import Assistant, EncodedImage, Message, load
from convllava.inference.likelihood import log_likelihoods
from convllava.io import JUDGEMENTS, RESULT, WEIGHTS, ResumableJsonl
from convllava.synthetic import World

CHOICES = ("generate", "likelihood")


def evaluate(
    model: Assistant | str | os.PathLike[str],
    benchmark: str = "generated",
    data: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    pixels: Mapping[str, Any] | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    categories: Sequence[str] = (),
    limit: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    size: int | None = None,
    simple: bool = False,
    world: World | None = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    choices: str = "generate",
    batch_size: int = 16,
    timed: int = 5,
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge: LLMJudge | None = None,
) -> Result:
    """Ask a model the questions of a benchmark, and score its answers.

    Args:
        model: The model, or its name or folder (see `convllava.load`).
        benchmark: "generated" (pages that are drawn now), or a name in `benchmarks.BENCHMARKS`.
        data: The benchmark's file, or a folder with it; not for "generated".
        output: Folder for answers.jsonl, settings.json and result.json. A run that was killed continues there.
        pixels: Settings of the image processor, as for `convllava.load`; only if `model` is loaded here.
        images, split, categories, limit: Which questions of the files; see `columns.load_questions`.
        samples: Number of generated pages; 1000 by default.
        seed: Seed of the generated pages; 1 by default.
        size: Square root of their area in pixels; 448 by default.
        simple: Draw the simpler pages of recipes/tiny-quick.yaml.
        world: Take the generated pages from this world instead of `seed`, `size` and `simple`.
        prompt: Replaces the benchmark's prompt template; has `{question}`, and may have `{options}` and `{hint}`.
        max_new_tokens: Longest answer; by default the benchmark's.
        choices: "generate" reads the letter from a written answer; "likelihood" takes the most likely letter.
        batch_size: Questions that are answered together.
        timed: Number of questions that are asked once more to measure efficiency; 0 for none.
        judge_url, judge_model: Server and model that grade free answers; see `llm_judge.ChatJudge`.
        judge: Grades free answers instead of that server.

    Raises:
        InputError: if an argument, a data file, the model or the output folder cannot be used.
    """
    # 1. Check the arguments before anything slow happens.
    bench = benchmark_named(benchmark)
    templates = bench.templates(prompt)
    max_new_tokens = max_new_tokens or bench.max_new_tokens
    if choices not in CHOICES:
        raise ConfigError(f"`choices` is {choices!r}; choose one of {', '.join(CHOICES)}")
    judge = judge or _llm_judge(judge_url, judge_model)
    if bench.needs_judge and judge is None:
        raise ConfigError(f"{bench.name} needs an LLM judge; give `judge_url` and `judge_model`")
    if bench.rule is rules.by_anls:
        metrics.similarity("", "")  # fails now if rapidfuzz is missing

    # 2. The questions.
    source: dict[str, Any]
    if bench.is_generated:
        if (data, images, split, limit) != (None,) * 4 or categories:
            raise ConfigError(
                "`data`, `images`, `split`, `limit` and `categories` are for benchmarks on files: name one with "
                "`benchmark`; for generated pages, `samples` sets the number of pages"
            )
        if choices != "generate":
            raise ConfigError(f"`choices` {choices} has no effect on generated pages: their questions have no options")
        samples = 1000 if samples is None else samples
        if world is not None and ((seed, size) != (None, None) or simple):
            raise ConfigError("`world` has its own seed and size; leave out `seed`, `size` and `simple`")
        seed, size = 1 if seed is None else seed, 448 if size is None else size
        world = world or World("heldout", seed=seed, size=size, simple=simple)
        questions = generated_questions(world, samples)
        source = {"world": describe_world(world), "samples": samples}
    else:
        if (samples, seed, size, world) != (None,) * 4 or simple:
            raise ConfigError(
                "`samples`, `seed`, `size` and `simple` are for generated pages; for a benchmark on files, `limit` "
                "sets the number of questions"
            )
        if data is None:
            raise ConfigError(f"`data` is missing: give the file or folder of {bench.name}")
        folder = None if images is None else Path(images)
        questions = load_questions(bench, Path(data), images=folder, split=split, categories=categories, limit=limit)
        source = {"data": str(data)}

    # 3. The model, and all settings that its answers depend on.
    name, assistant = open_model(model, pixels)
    content = "\n".join(repr((item.id, item.text, item.options)) for item in questions)
    processor = assistant.processor.image_processor
    settings = {
        "benchmark": bench.name,
        "model": name,
        WEIGHTS: weights_digest(assistant.model),
        "images": None if images is None else str(images),
        "split": split,
        "categories": list(categories),
        "limit": limit,
        "templates": templates,
        "max_new_tokens": max_new_tokens,
        "choices": choices,
        "batch_size": batch_size,
        "judge": getattr(judge, "model", None),
        "dtype": str(assistant.model.dtype).removeprefix("torch."),
        "pixels": {key: getattr(processor, key) for key in ("mode", "side", "min_pixels", "max_pixels")},
        **source,
        "questions": hashlib.blake2b(content.encode(), digest_size=8).hexdigest(),
    }

    # 4. Answers, then grades.
    out = None if output is None else Path(output)
    journal, started = ResumableJsonl(out, settings), time.monotonic()
    with progress_bar(bench.name) as progress:
        answer_all(assistant, questions, journal, templates, max_new_tokens, choices, batch_size, progress)
    seconds = round(time.monotonic() - started, 1)
    if judge is not None:
        judge = remember_grades(judge, ResumableJsonl(out, settings, JUDGEMENTS))
    answers = [checked_answer(entry, "an answer") for entry in journal.entries.values()]
    with progress_bar("scoring") as progress:
        scores = score_answers(bench, questions, answers, GradingContext(processor.placement, judge), progress=progress)

    # 5. The result.
    efficiency = measure_efficiency(assistant, questions[:timed], templates, max_new_tokens) if timed else None
    result = Result(
        scores
        | {
            "model": describe_model(name, assistant),
            "versions": versions(),
            "settings": settings,
            "prompts": templates,
            "efficiency": efficiency,
            "seconds": seconds,
        }
        | (by_task(scores, source["samples"]) if bench.is_generated else {})
    )
    if out is not None:
        result.save(out / RESULT)
    return result


def evaluate_all(
    model: Assistant | str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    *,
    output: str | os.PathLike[str] | None = None,
    pixels: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Result | InputError]:
    """Run every benchmark that a folder holds.

    Args:
        model, pixels: See `evaluate`.
        data: Folder with a file or folder for each benchmark; see `benchmarks.find_benchmarks`.
        output: Folder for the outputs, one subfolder per benchmark.
        settings: Other arguments of `evaluate`.

    Returns:
        The result of each benchmark by name, or why it could not be run.

    Raises:
        InputError: if the folder or the model cannot be used, or no benchmark could be run.
    """
    if data is None:
        raise ConfigError("`data` is missing: give a folder with a file or folder for each benchmark")
    found = find_benchmarks(Path(data))
    if isinstance(model, str | os.PathLike):
        name, model = open_model(model, pixels)
        model.model.name_or_path = name  # results show the name that the user gave
    results: dict[str, Result | InputError] = {}
    for name, path in found.items():
        try:
            folder = None if output is None else Path(output) / name
            results[name] = evaluate(model, name, path, output=folder, **settings)
        except InputError as error:
            results[name] = error
    if not any(isinstance(result, Result) for result in results.values()):
        raise ConfigError("; ".join(map(str, results.values())))
    return results


def score_file(
    benchmark: str,
    data: str | os.PathLike[str],
    answers: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    categories: Sequence[str] = (),
    limit: int | None = None,
    model: str | None = None,
    judge_url: str | None = None,
    judge_model: str | None = None,
) -> Result:
    """Score answers that were made elsewhere.

    Args:
        answers: JSON lines; see `results.read_answers`.
        model: Boxes are fractions of this model's canvas; by default, of the image.
        benchmark, data, images, split, categories, limit, judge_url, judge_model: See `evaluate`.

    Raises:
        InputError: if an argument or a file cannot be used.
    """
    bench = benchmark_named(benchmark)
    if bench.is_generated:
        raise ConfigError(f"`benchmark` {benchmark} has no data file; evaluate the model on it instead")
    judge = _llm_judge(judge_url, judge_model)
    given = read_answers(Path(answers))
    folder = None if images is None else Path(images)
    questions = load_questions(bench, Path(data), images=folder, split=split, categories=categories, limit=limit)
    placement = None if model is None else checkpoints.processor(checkpoints.find(model)).image_processor.placement
    return Result(score_answers(bench, questions, given, GradingContext(placement, judge)))


def open_model(
    model: Assistant | str | os.PathLike[str], pixels: Mapping[str, Any] | None = None
) -> tuple[str, Assistant]:
    """Return a model's name and the model, loaded if it is a name.

    Raises:
        InputError: if it cannot be loaded, or if `pixels` is given for a model that is already loaded.
    """
    if isinstance(model, str | os.PathLike):
        return str(model), load(model, pixels=pixels)
    if pixels:
        raise ConfigError("`pixels` has no effect on a model that is already loaded; give it to convllava.load")
    name = getattr(model.model, "name_or_path", "") or "unnamed"
    return Path(name).name if Path(name).parent == checkpoints.SHIPPED else name, model


def answer_all(
    assistant: Assistant,
    questions: Sequence[Question],
    journal: ResumableJsonl,
    templates: Mapping[str, str],
    max_new_tokens: int,
    choices: str = "generate",
    batch_size: int = 16,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Answer the questions that the journal has no answer to; a question that cannot be asked gets the reason instead.

    If any question of a batch is left, the whole batch is answered again, because the batch affects the last bits of
    the logits: so an interrupted run gives the same answers. An image that two batches in a row use is encoded once.

    Args:
        journal: Receives {"id", "answer"} or {"id", "error"} for each question.
        templates: See `questions.prompt`.
        max_new_tokens, choices, batch_size: See `evaluate`.
        progress: Called with the share of answered questions, 0 to 1.
    """
    encoded: dict[Picture, EncodedImage] = {}
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        if any(question.id not in journal.entries for question in batch):
            encoded = {picture: encoded[picture] for item in batch for picture in item.pictures if picture in encoded}
            replies: dict[str, str | InputError] = {question.id: "" for question in batch}
            together: dict[str, tuple[Sequence[Message], Sequence[EncodedImage]]] = {}
            for question in batch:
                try:
                    messages, pictures = conversation(question, templates)
                    for picture in pictures:
                        if picture not in encoded:
                            encoded[picture] = assistant.encode(picture.load())
                    asked = messages, [encoded[picture] for picture in pictures]
                    if choices == "likelihood" and question.options:
                        replies[question.id] = likeliest_letter(assistant, *asked, question.letters)
                    else:
                        together[question.id] = asked
                except InputError as error:
                    replies[question.id] = error
            answers = assistant.chat_many(list(together.values()), max_new_tokens=max_new_tokens)
            replies |= zip(together, answers, strict=True)
            journal.add(
                {"id": name, "error": str(reply)}
                if isinstance(reply, InputError)
                else {"id": name, "answer": reply.strip()}
                for name, reply in replies.items()
            )
        progress((start + len(batch)) / len(questions))


def likeliest_letter(
    assistant: Assistant, messages: Sequence[Message], images: Sequence[EncodedImage], letters: str
) -> str:
    """Return the letter with the highest likelihood; the first of equal ones."""
    scores = log_likelihoods(assistant, [(images, messages, letter) for letter in letters])
    return letters[max(range(len(letters)), key=lambda number: scores[number].total)]


def _llm_judge(judge_url: str | None, judge_model: str | None) -> LLMJudge | None:
    if (judge_url is None) != (judge_model is None):
        raise ConfigError("`judge_url` and `judge_model` go together: the server, and the model there that grades")
    return None if judge_url is None or judge_model is None else ChatJudge(judge_url, judge_model)


def remember_grades(judge: LLMJudge, journal: ResumableJsonl) -> LLMJudge:
    """Return a judge that grades the same question, truth and answer only once, so that a killed run continues."""

    def grade(question: str, truth: str, answer: str) -> float | None:
        name = hashlib.blake2b("\0".join((question, truth, answer)).encode(), digest_size=16).hexdigest()
        if name not in journal.entries:
            journal.add([{"id": name, "score": judge(question, truth, answer)}])
        return journal.entries[name]["score"]

    return grade


def describe_model(name: str, assistant: Assistant) -> dict[str, Any]:
    """Return a model's name, the number of parameters of its parts, and the recipe in its folder if there is one."""
    parts = assistant.model.model
    modules = {"tower": parts.vision_tower, "projector": parts.multi_modal_projector, "language": parts.language_model}
    shipped = checkpoints.SHIPPED / name
    recipe = (shipped if shipped.is_dir() else Path(name)) / "recipe.yaml"
    return {
        "name": name,
        "parameters": {part: sum(weight.numel() for weight in module.parameters()) for part, module in modules.items()},
        "recipe": yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the package, torch and transformers, and the commit if the package is in a repository."""
    home, commit = Path(__file__).parents[3], None
    if (home / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        with suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "convllava": convllava.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
