"""The benchmarks: how questions are asked, by which rule answers are graded, and how grades become numbers."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from convllava.errors import ConfigError, DataError
from convllava.evaluation import aggregate, rules
from convllava.evaluation.aggregate import MME_COGNITION, MME_PERCEPTION, Graded, Groups
from convllava.evaluation.questions import check_template
from convllava.evaluation.readers import SUFFIXES

QUESTION = "{question}"
SHORT = "{question}\nAnswer the question using a single word or phrase."
CHOICE = "{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: {question}"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: Its name on the command line.
        source: The paper or page that it comes from.
        rule: Grades one answer.
        open_prompt, choice_prompt: Templates of questions without and with options. They are those of LLaVA-1.5, with
            which the published numbers of ConvLLaVA were measured.
        summarise: Grades -> measures, of all questions or of one category.
        primary: The measure that is the benchmark's score.
        parts: Categories that the score adds up. Each bootstrap draw keeps the number of questions of each.
        units: The units that a comparison of two models pairs.
        max_new_tokens: Longest answer.
        family: The benchmark that defines its file format, if that is another one.
        needs_judge: An LLM judge must grade the answers.
        is_generated: The questions are about generated pages, so there is no data file.
        aliases: Other names; in lower case, they may begin the names of its files too.
    """

    name: str
    source: str
    rule: rules.Rule
    open_prompt: str = SHORT
    choice_prompt: str = CHOICE
    summarise: Callable[[Groups], dict[str, float]] = aggregate.mean
    primary: str = "accuracy"
    parts: tuple[str, ...] = ()
    units: Callable[[Groups], list[Graded]] = aggregate.each
    max_new_tokens: int = 32
    family: str = ""
    needs_judge: bool = False
    is_generated: bool = False
    aliases: tuple[str, ...] = ()

    def templates(self, prompt: str | None = None) -> dict[str, str]:
        """Return the prompt templates of questions without options ("open") and with options ("choice").

        Args:
            prompt: Replaces both templates; see `questions.check_template`.
        """
        if prompt is not None:
            return dict.fromkeys(("open", "choice"), check_template(prompt))
        return {"open": self.open_prompt, "choice": self.choice_prompt}


_documents = partial(Benchmark, rule=rules.by_anls, summarise=aggregate.anls, primary="anls", max_new_tokens=64)
_boxes = partial(Benchmark, rule=rules.by_box, open_prompt=BOX, max_new_tokens=64, family="refcoco")
_ALL = (
    Benchmark(
        "generated",
        "convllava.synthetic",
        rules.by_task,
        QUESTION,
        QUESTION,
        summarise=aggregate.seen_and_blind,
        units=aggregate.seen,
        max_new_tokens=64,
        is_generated=True,
        aliases=("synthetic",),
    ),
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
    ),
    Benchmark("seedbench", "arXiv 2307.16125", rules.by_choice),
    Benchmark("realworldqa", "x.ai/blog/grok-1.5v", rules.by_choice_or_text, open_prompt=QUESTION),
    Benchmark("mmmu", "arXiv 2311.16502", rules.by_mmmu, max_new_tokens=128),
    Benchmark(
        "mmvet", "arXiv 2308.02490", rules.by_llm_judge, QUESTION, QUESTION, max_new_tokens=512, needs_judge=True
    ),
    Benchmark("textvqa", "arXiv 1904.08920", rules.by_vqa),
    _documents("docvqa", "arXiv 2007.00398"),
    Benchmark(
        "pope", "arXiv 2305.10355", rules.by_sentence, summarise=aggregate.yes_or_no, primary="f1", max_new_tokens=16
    ),
    _boxes("refcoco", "arXiv 1608.00272"),
    _boxes("refcoco+", "arXiv 1608.00272", aliases=("refcocoplus",)),
    _boxes("refcocog", "arXiv 1511.02283"),
    Benchmark("chartqa", "arXiv 2203.10244", rules.by_chart),
    Benchmark(
        "ocrbench", "arXiv 2305.07895", rules.by_containment, QUESTION, summarise=aggregate.points, max_new_tokens=128
    ),
    _documents("infovqa", "arXiv 2104.12756", aliases=("infographic",)),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def benchmark_named(name: str) -> Benchmark:
    """Return a benchmark by its name or an alias.

    Raises:
        ConfigError: if there is none; the message lists the names.
    """
    for benchmark in BENCHMARKS.values():
        if name in (benchmark.name, *benchmark.aliases):
            return benchmark
    raise ConfigError(f"there is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}, or all")


def find_benchmarks(folder: Path) -> dict[str, Path]:
    """Return the benchmarks in a folder, recognised by how its file and folder names begin (MMBench_DEV_EN.tsv).

    Raises:
        DataError: if there is no such folder, no benchmark in it, or one of them twice.
    """
    if not folder.is_dir():
        raise DataError(f"`data` {folder}: to run all benchmarks, give a folder with a file or folder for each")
    on_files = [item for item in BENCHMARKS.values() if not item.is_generated]
    names = {alias: item.name for item in on_files for alias in (item.name, *item.aliases)}
    entries: dict[str, list[Path]] = defaultdict(list)
    for entry in sorted(folder.iterdir()):
        plain = re.sub(r"[^a-z0-9+]", "", entry.stem.lower())
        fitting = [alias for alias in names if plain.startswith(alias)]
        if fitting and (entry.is_dir() or entry.suffix in SUFFIXES):
            entries[names[max(fitting, key=len)]].append(entry)
    for name, found in entries.items():
        if len(found) > 1:
            raise DataError(f"{folder} holds {name} twice, {found[0].name} and {found[1].name}; give one with `data`")
    if not entries:
        raise DataError(f"{folder} holds no benchmark; names begin with one of {', '.join(names)}")
    return {name: entries[name][0] for name in BENCHMARKS if name in entries}
