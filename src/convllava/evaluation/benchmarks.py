"""The benchmarks: what a model is asked, by which rule its answers are judged, and how scores become numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from convllava.errors import InputError
from convllava.evaluation import aggregate, rules
from convllava.evaluation.aggregate import Groups, Judged
from convllava.evaluation.columns import MME_COGNITION, MME_PERCEPTION

QUESTION = "{question}"
SHORT = "{question}\nAnswer the question using a single word or phrase."
CHOICE = "{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: {question}"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: As on the command line.
        paper: Where it comes from.
        rule: Judges one answer.
        summarise: Scores -> measures of all questions, or of those of one category.
        primary: The measure that stands for the benchmark.
        parts: The categories whose sum that is, so that each must have questions, in every bootstrap draw too.
        open_prompt, choice_prompt: What a question becomes, without and with options. The forms are those of LLaVA-1.5,
            which the published numbers of ConvLLaVA are asked in.
        units: What a comparison of two models pairs.
        max_new_tokens: Longest answer.
        family: Whose file formats it has.
        needs_judge: Whether another model must score its answers.
        aliases: Other beginnings of its files' names, in lower case, letters and digits alone.
    """

    name: str
    paper: str
    rule: rules.Rule
    open_prompt: str = SHORT
    choice_prompt: str = CHOICE
    summarise: Callable[[Groups], dict[str, float]] = aggregate.mean
    primary: str = "accuracy"
    parts: tuple[str, ...] = ()
    units: Callable[[Groups], list[Judged]] = aggregate.each
    max_new_tokens: int = 32
    family: str = ""
    needs_judge: bool = False
    aliases: tuple[str, ...] = ()


_ALL = (
    Benchmark(
        "mme",
        "arXiv 2306.13394",
        rules.by_start,
        summarise=aggregate.mme,
        primary="total",
        parts=(*MME_PERCEPTION, *MME_COGNITION),
        max_new_tokens=16,
    ),
    Benchmark(
        "mmbench",
        "arXiv 2307.06281",
        rules.by_choice,
        summarise=aggregate.circular,
        primary="circular",
        units=aggregate.worst,
        max_new_tokens=32,
    ),
    Benchmark("seedbench", "arXiv 2307.16125", rules.by_choice, max_new_tokens=32),
    Benchmark("realworldqa", "x.ai/blog/grok-1.5v", rules.by_choice_or_text, open_prompt=QUESTION, max_new_tokens=32),
    Benchmark("mmmu", "arXiv 2311.16502", rules.by_mmmu, max_new_tokens=128),
    Benchmark("mmvet", "arXiv 2308.02490", rules.by_judge, QUESTION, QUESTION, max_new_tokens=512, needs_judge=True),
    Benchmark("textvqa", "arXiv 1904.08920", rules.by_vqa),
    Benchmark("docvqa", "arXiv 2007.00398", rules.by_anls, primary="anls", summarise=aggregate.anls, max_new_tokens=64),
    Benchmark(
        "pope",
        "arXiv 2305.10355",
        rules.by_sentence,
        summarise=aggregate.yes_or_no,
        primary="f1",
        max_new_tokens=16,
    ),
    Benchmark("refcoco", "arXiv 1608.00272", rules.by_box, BOX, family="refcoco", max_new_tokens=64),
    Benchmark(
        "refcoco+",
        "arXiv 1608.00272",
        rules.by_box,
        BOX,
        family="refcoco",
        max_new_tokens=64,
        aliases=("refcocoplus",),
    ),
    Benchmark("refcocog", "arXiv 1511.02283", rules.by_box, BOX, family="refcoco", max_new_tokens=64),
    Benchmark("chartqa", "arXiv 2203.10244", rules.by_chart),
    Benchmark(
        "ocrbench",
        "arXiv 2305.07895",
        rules.by_containment,
        QUESTION,
        summarise=aggregate.points,
        max_new_tokens=128,
    ),
    Benchmark(
        "infovqa",
        "arXiv 2104.12756",
        rules.by_anls,
        primary="anls",
        summarise=aggregate.anls,
        max_new_tokens=64,
        aliases=("infographic",),
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def benchmark_named(name: str) -> Benchmark:
    """Raises InputError, with the names there are, where there is none of that name."""
    if name not in BENCHMARKS:
        raise InputError(
            f"there is no benchmark {name!r} on files; choose one of {', '.join(BENCHMARKS)}; to run them, all, and of "
            "the generated world, synthetic"
        )
    return BENCHMARKS[name]
