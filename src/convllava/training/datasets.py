"""What a stage sees: the generated world, or files of conversations."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convllava.data import storage
from convllava.data.batching import MicroBatchDataset
from convllava.data.collate import collate, pack
from convllava.data.dataset import FileDataset, steps_of
from convllava.data.dense_labels import AlignmentDataset, DenseDataset, collate_dense
from convllava.data.formats import Records, open_records
from convllava.data.mixture import Mixture, MixtureSource
from convllava.data.synthetic_chat import ChatDataset
from convllava.errors import InputError
from convllava.synthetic import World
from convllava.training.recipe import Data, Recipe, Source, Stage

_LENGTH_STEP = 32
"""Rows of padded samples are as long as a multiple of this where a CPU computes them in bfloat16: it makes its kernels
anew for every length, which takes as long as they then run."""
Question = tuple[list[dict[str, Any]], str]
"""A conversation up to its first answer, and that answer."""


def make_dataset(recipe: Recipe, index: int, processor: Any) -> Dataset:
    """As many samples as the stage has steps for, every stage with a seed of its own; of the generated world's training
    split, or of files."""
    stage = recipe.stages[index]
    assert stage.steps is not None
    return _dataset(recipe, index, processor, "train", stage.steps * stage.batch_size, stage.data.sources)


def make_held_out(recipe: Recipe, index: int, processor: Any) -> Dataset:
    """The samples that the stage is evaluated on: of the generated world's held-out split, or of other files."""
    evaluation = recipe.stages[index].evaluation
    assert evaluation is not None
    return _dataset(recipe, index, processor, "heldout", evaluation.samples, evaluation.sources)


def _dataset(recipe: Recipe, index: int, processor: Any, split: str, length: int, sources: Sequence[Source]) -> Dataset:
    stage, data = recipe.stages[index], recipe.stages[index].data
    if sources:
        mixture = _mixture(recipe, index, sources)
        length = length if split == "train" else min(length, len(mixture))
        return FileDataset(mixture, processor, length, max_tokens=data.max_tokens, truncate=data.overlong == "truncate")
    world = make_world(data, _seed(recipe, index), split)
    if stage.objective == "dense":
        return DenseDataset(world, processor, length, sheets=data.glyph_sheets)
    if stage.objective == "align":
        return AlignmentDataset(
            world, processor, length, sheets=data.glyph_sheets, stride=processor.image_processor.stride
        )
    return ChatDataset(
        world,
        processor,
        length,
        captions=data.captions,
        casual=data.casual_questions,
        images=data.images,
        attention_targets=stage.attention_supervision > 0,
        position_labels=stage.position_label_weight > 0,
        character_labels=stage.character_label_weight > 0,
    )


def mixture_of(recipe: Recipe, index: int) -> Mixture:
    """Which sample of its files a stage sees when.

    Raises:
        InputError: see `open_records`.
    """
    return _mixture(recipe, index, recipe.stages[index].data.sources)


def _mixture(recipe: Recipe, index: int, sources: Sequence[Source]) -> Mixture:
    return Mixture(mixture_sources(recipe, sources), _seed(recipe, index))


def _seed(recipe: Recipe, index: int) -> int:
    """Of a stage's data."""
    return 1000 * recipe.seed + index


def questions_of(dataset: ChatDataset | FileDataset, count: int) -> list[Question]:
    """The first samples of a dataset that ask about an image."""
    asked = filter(None, (_question(dataset, index) for index in range(len(dataset))))
    return list(itertools.islice(asked, count))


def _question(dataset: ChatDataset | FileDataset, index: int) -> Question | None:
    try:
        messages = dataset.conversation(index)
    except InputError:
        return None  # evaluation tells of it
    end = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
    asks = any(part["type"] == "image" for message in messages[:end] for part in message["content"])
    return (messages[:end], messages[end]["content"][0]["text"]) if asks else None


def distinct_samples(dataset: Any) -> int:
    """How many different samples a stage goes through."""
    if isinstance(dataset, MicroBatchDataset):
        return min(len(dataset.positions), len(dataset.samples.mixture))
    return min(len(dataset), len(dataset.mixture)) if isinstance(dataset, FileDataset) else len(dataset)


def image_of(item: dict[str, Tensor]) -> Tensor:
    """The first image of a dataset's item, (3, height, width)."""
    pixels = item["pixel_values"]
    return pixels if pixels.ndim == 3 else pixels[0]


def make_world(data: Data, seed: int, split: str = "train") -> World:
    """The generated world that a stage's data names."""
    return World(
        split,
        seed=seed,
        size=data.size,
        kinds=data.kinds,
        simple=data.simple,
        turns=data.turns,
        grounding=data.grounding,
        min_brightness=data.min_brightness,
    )


Collator = Callable[[list[Any]], dict[str, Any]]


def make_collator(stage: Stage, processor: Any) -> Collator:
    """Makes a batch of a list of a dataset's items, each of which may be a whole pass."""
    if stage.objective != "chat":
        return collate_dense
    rounded = stage.precision == "bfloat16" and stage.budget is None and not torch.accelerator.is_available()
    multiple = _LENGTH_STEP if rounded else 1
    padded = partial(collate, pad_token_id=processor.tokenizer.pad_token_id, multiple=multiple)
    collator: Collator = pack if stage.packing else padded
    return collator if stage.budget is None else partial(_of_passes, collator)


def _of_passes(collator: Collator, items: list[Any]) -> dict[str, Any]:
    """Held-out samples come one by one, those that train in passes."""
    return collator([sample for item in items for sample in (item if isinstance(item, list) else [item])])


def mixture_sources(recipe: Recipe, sources: Sequence[Source]) -> list[MixtureSource]:
    """Open the sources of a mixture.

    Raises:
        InputError: see `open_records`.
    """
    return [
        MixtureSource(records_of(recipe, source), images_of(recipe, source), source.repeat, source.weight)
        for source in sources
    ]


def records_of(recipe: Recipe, source: Source) -> Records:
    """The records of a source.

    Raises:
        InputError: see `open_records`.
    """
    return open_records(
        source.name,
        addresses_of(recipe, source),
        kind=source.format,
        limit=source.limit,
        subset=source.subset,
        split=source.split,
    )


def addresses_of(recipe: Recipe, source: Source) -> list[str]:
    """Where a source's files lie, patterns as they are; a name for `load_dataset` where there is no such file."""
    found = [storage.within(recipe.data_root, path) for path in source.paths]
    is_name = source.format == "datasets" and not any(map(storage.exists, found))
    return source.paths if is_name else found


def stamps_of(recipe: Recipe, source: Source) -> list[tuple[str, str]]:
    """A source's files, each with what changes when it does.

    Raises:
        InputError: a pattern that no file has.
    """
    files = [file for address in addresses_of(recipe, source) for file in storage.expand(address)]
    return [(file, storage.stamp(file)) for file in files]


def images_of(recipe: Recipe, source: Source) -> str:
    """The folder that a source's images are relative to."""
    return storage.within(recipe.data_root, source.images)


def with_steps(recipe: Recipe) -> Recipe:
    """The recipe with steps in place of epochs, for which its files are counted; but not of stages with a budget (see
    `measuring.with_planned_steps`).

    Raises:
        InputError: a file that is not there or cannot be read.
    """
    return dataclasses.replace(recipe, stages=[_with_steps(recipe, stage) for stage in recipe.stages])


def _with_steps(recipe: Recipe, stage: Stage) -> Stage:
    if stage.epochs is None or stage.budget is not None:
        return stage
    mixture = Mixture(mixture_sources(recipe, stage.data.sources))
    return dataclasses.replace(stage, steps=steps_of(len(mixture), stage.epochs, stage.batch_size), epochs=None)


def missing_files(recipe: Recipe) -> Iterator[str]:
    """Data files and folders of images that are not there, each once."""
    sources = [source for stage in recipe.stages for source in stage.all_sources]
    return iter(dict.fromkeys(path for source in sources for path in _missing_of(recipe, source)))


def _missing_of(recipe: Recipe, source: Source) -> Iterator[str]:
    addresses = addresses_of(recipe, source)
    is_name = source.format == "datasets" and addresses == source.paths
    yield from (address for address in addresses if not is_name and not storage.matches(address))
    if not storage.is_remote(images := images_of(recipe, source)) and not storage.exists(images):
        yield images


def missing_images(recipe: Recipe, samples: int = 1000) -> Iterator[Path]:
    """Folders that are not there among those of images of so many samples spread over each file that is."""
    found: dict[Path, None] = {}
    for source in {source.name: source for stage in recipe.stages for source in stage.all_sources}.values():
        folder = images_of(recipe, source)
        if any(_missing_of(recipe, source)) or storage.is_remote(folder):
            continue
        records = records_of(recipe, source)
        if not records.embeds_images:
            for number in range(0, len(records), max(1, len(records) // samples)):
                found |= dict.fromkeys(path.parent for path in _images_in(records[number], Path(folder)))
    return (folder for folder in found if not folder.exists())


def _images_in(record: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Those that it names; what is no name is the examination's to tell."""
    named = record.get("image")
    for path in named if isinstance(named, list) else [named]:
        if path and isinstance(path, str):
            yield folder / path
