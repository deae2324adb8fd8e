"""Which files a benchmark is in: a file, a folder of files, or a folder of benchmarks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from convllava.errors import InputError
from convllava.evaluation.benchmarks import BENCHMARKS, Benchmark
from convllava.evaluation.columns import read_questions
from convllava.evaluation.questions import Question
from convllava.evaluation.readers.tables import SUFFIXES

_JOINED = ("pope", "chartqa")
"""Benchmarks whose original JSON files are parts of one whole."""


def load_questions(
    benchmark: Benchmark,
    data: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    categories: Sequence[str] = (),
    limit: int | None = None,
) -> list[Question]:
    """The questions of a benchmark.

    Args:
        benchmark: Which.
        data: Its file, or a folder with it.
        images: Folder of images that lie in files of their own; by default the folder of the data.
        split: Part of the names of the files to take, such as validation.
        categories: Take questions of these alone.
        limit: Take so many of the first; the rotations of a choice, or the pair about an image, are one.

    Raises:
        InputError: there is no such file, or several that do not belong together; an unknown category; what
            `formats.read_questions` refuses.
    """
    paths = find_tables(benchmark, data, split)
    folder = images or (data if data.is_dir() else data.parent)
    questions = read_questions(benchmark.family or benchmark.name, paths, folder)
    known = list(dict.fromkeys(name for question in questions for name in question.categories))
    for category in categories:
        if category not in known:
            raise InputError(
                f"no question of {data} is of the category {category!r}; known: {', '.join(known) or 'none'}"
            )
    chosen = [item for item in questions if not categories or set(categories) & set(item.categories)]
    kept = set(list(dict.fromkeys(_group(item) for item in chosen))[:limit])
    return [item for item in chosen if _group(item) in kept]


def _group(question: Question) -> tuple[bool, str]:
    return bool(question.group), question.group or question.id


def find_tables(benchmark: Benchmark, data: Path, split: str | None) -> list[Path]:
    """The files of a benchmark; shards of one table (test-00000-of-00002.parquet) in their order."""
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise InputError(f"{data}: there is no such file or folder")
    found = sorted(path for path in data.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    chosen = [path for path in found if split is None or split in path.stem]
    if not chosen:
        what = f"with {split!r} in its name" if split else f"that ends in {', '.join(SUFFIXES)}"
        raise InputError(f"{data} holds no file {what}")
    tables = sorted({_table(path) for path in chosen})
    is_whole = benchmark.name in _JOINED and all(path.suffix in (".json", ".jsonl") for path in chosen)
    if len(tables) > 1 and not is_whole:
        raise InputError(f"{data} holds {', '.join(tables[:8])}; choose one with --split, or give the file")
    return chosen


def _table(path: Path) -> str:
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)


def find_benchmarks(folder: Path) -> dict[str, Path]:
    """The benchmarks in a folder, by the beginnings of the names of its files and folders (MMBench_DEV_EN.tsv).

    Raises:
        InputError: there is no such folder, none in it, or two of one kind.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: --benchmark all needs a folder with a file or folder for each benchmark")
    entries: dict[str, list[Path]] = defaultdict(list)
    for entry in sorted(folder.iterdir()):
        if (entry.is_dir() or entry.suffix in SUFFIXES) and (name := _named(entry)):
            entries[name].append(entry)
    for name, found in entries.items():
        if len(found) > 1:
            raise InputError(f"{folder} holds {name} twice, {found[0].name} and {found[1].name}; give one with --data")
    if not entries:
        raise InputError(f"{folder} holds no benchmark; names begin with one of {', '.join(BENCHMARKS)}")
    return {name: entries[name][0] for name in BENCHMARKS if name in entries}


def _named(entry: Path) -> str | None:
    """The benchmark with the longest name that the entry's begins with."""
    plain = re.sub(r"[^a-z0-9+]", "", entry.stem.lower())
    names = {alias: item.name for item in BENCHMARKS.values() for alias in (item.name, *item.aliases)}
    fitting = [alias for alias in names if plain.startswith(alias)]
    return names[max(fitting, key=len)] if fitting else None
