"""The part of a recipe that says what a stage sees: files of conversations, or pages of the generated world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from convllava.data import Format
from convllava.errors import InputError


@dataclass(frozen=True)
class Source:
    """Files of conversations; docs/data.md shows every format."""

    path: str | list[str]
    """A file, a pattern of files with `*`, or a list of either: paths relative to the recipe's `data_root`, or
    addresses that fsspec opens. With the format `datasets` also a name for `datasets.load_dataset`."""
    images: str = ""
    """Folder that the images' paths are relative to; relative to `data_root` itself."""
    format: Format | None = None
    """None: by the name of the file."""
    subset: str | None = None
    """Of a name for `datasets.load_dataset`."""
    split: str = "train"
    """Of a name for `datasets.load_dataset`."""
    limit: int | None = None
    """Take so many samples from the beginning."""
    repeat: float = 1.0
    """How often each sample comes in an epoch; 1.5 repeats the first half."""
    weight: float | None = None
    """In place of `repeat`, and in all sources of a stage or in none: the share of an epoch that comes from here is
    this among the sum of all. An epoch is as long as the sources are together; what it leaves out comes in the next."""

    def __post_init__(self) -> None:
        if self.repeat <= 0 or (self.limit is not None and self.limit < 1):
            raise InputError(f"source {self.name}: repeat must be above 0 and limit 1 or more")
        if self.weight is not None and (self.weight <= 0 or self.repeat != 1.0):
            raise InputError(f"source {self.name}: weight must be above 0, and stands in place of repeat")
        if not self.paths:
            raise InputError("a source needs a path")

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def name(self) -> str:
        """What reports call it."""
        return ", ".join([*self.paths[:2], "..."][: len(self.paths)]) + (f" ({self.subset})" if self.subset else "")


@dataclass(frozen=True)
class Data:
    """Samples of files, where sources are named, else of the generated world, where one page gives one sequence: its
    question-answer turns and its caption."""

    sources: list[Source] = field(default_factory=list)
    """Files of conversations; the settings of the generated world then have no meaning."""
    max_tokens: int | None = None
    """Longest sequence of a file's sample, visual tokens included; None: the language model's context."""
    overlong: Literal["truncate", "skip"] = "truncate"
    """What happens to a longer one; a cut through an image is never made, the sample is skipped."""
    max_skipped: float = 0.05
    """Bad samples of files are skipped and written to `skipped.jsonl`; more than this share of all stops the run."""
    size: int = 384
    """Square root of the pages' area in pixels."""
    kinds: dict[str, float] | None = None
    """Weights of the kinds of page; None: the world's own mix."""
    simple: bool = False
    """The simpler world of shapes, tickets and bar charts."""
    turns: int = 6
    """Question-answer turns per image."""
    grounding: float = 0.12
    """Share of the turns that ask for a box."""
    darkest: float = 1.0
    """Share of its light that the darkest page keeps."""
    captions: float = 1.0
    """Share of samples with the caption before or, mostly, behind the turns."""
    casual: float = 0.0
    """Share of the questions without capitals and final mark, or behind other words such as "One question:"."""
    images: bool = True
    """False: the same conversations without the image, for a language model that has never seen text."""
    sheets: float = 0.0
    """Share of glyph sheets (objectives dense and align only)."""

    def __post_init__(self) -> None:
        weighted = [source for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise InputError(f"source {weighted[0].name}: weight is for all sources of a stage or for none")
