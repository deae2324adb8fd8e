"""What a stage sees: the generated world, or files of conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from convllava.data.cells import AlignDataset, DenseDataset, collate_dense
from convllava.data.conversation import collate, pack
from convllava.data.sources import FileDataset, Mixture, Records, steps_of
from convllava.data.synthetic import ChatDataset
from convllava.synthetic import World
from convllava.training.recipe import Data, Recipe, Source, Stage


def make_dataset(recipe: Recipe, index: int, processor: Any) -> Dataset:
    """As many samples as the stage has steps for, every stage with a seed of its own; of the generated world's training
    split, or of files."""
    stage, data = recipe.stages[index], recipe.stages[index].data
    seed = 1000 * recipe.seed + index
    assert stage.steps is not None
    length = stage.steps * stage.batch_size
    if data.sources:
        files = [(records_of(recipe, source), images_of(recipe, source), source.repeat) for source in data.sources]
        truncate = data.overlong == "truncate"
        return FileDataset(files, processor, length, seed=seed, max_tokens=data.max_tokens, truncate=truncate)
    world = make_world(data, seed)
    if stage.objective == "dense":
        return DenseDataset(world, processor, length, sheets=data.sheets)
    if stage.objective == "align":
        return AlignDataset(world, processor, length, sheets=data.sheets, stride=processor.image_processor.stride)
    return ChatDataset(world, processor, length, captions=data.captions, images=data.images, guided=stage.guidance > 0)


def distinct_samples(dataset: Any) -> int:
    """How many different samples a stage goes through."""
    return min(len(dataset), len(dataset.mixture)) if isinstance(dataset, FileDataset) else len(dataset)


def image_of(item: dict[str, Tensor]) -> Tensor:
    """The first image of a dataset's item, (3, height, width)."""
    pixels = item["pixel_values"]
    return pixels if pixels.ndim == 3 else pixels[0]


def make_world(data: Data, seed: int) -> World:
    """The training split of the generated world that a stage's data names."""
    return World(
        "train",
        seed=seed,
        size=data.size,
        kinds=data.kinds,
        simple=data.simple,
        turns=data.turns,
        grounding=data.grounding,
    )


def make_collator(stage: Stage, processor: Any) -> Any:
    if stage.objective != "chat":
        return collate_dense
    if stage.packing:
        return pack
    return partial(collate, pad_token_id=processor.tokenizer.pad_token_id)


def records_of(recipe: Recipe, source: Source) -> Records:
    """The records of a source.

    Raises:
        InputError: see `Records`.
    """
    return Records(Path(recipe.data_root) / source.path, source.limit)


def images_of(recipe: Recipe, source: Source) -> Path:
    """The folder that a source's images are relative to."""
    return Path(recipe.data_root) / source.images


def with_steps(recipe: Recipe) -> Recipe:
    """The recipe with steps in place of epochs, for which its files are counted.

    Raises:
        InputError: a file that is not there or cannot be read.
    """
    return dataclasses.replace(recipe, stages=[_with_steps(recipe, stage) for stage in recipe.stages])


def _with_steps(recipe: Recipe, stage: Stage) -> Stage:
    if stage.epochs is None:
        return stage
    sources = stage.data.sources
    mixture = Mixture([len(records_of(recipe, source)) for source in sources], [source.repeat for source in sources])
    return dataclasses.replace(stage, steps=steps_of(len(mixture), stage.epochs, stage.batch_size), epochs=None)


def missing_files(recipe: Recipe) -> Iterator[Path]:
    """Data files and folders of images that are not there, each once."""
    sources = [source for stage in recipe.stages for source in stage.data.sources]
    paths = [path for source in sources for path in (Path(recipe.data_root) / source.path, images_of(recipe, source))]
    return (path for path in dict.fromkeys(paths) if not path.exists())


def missing_images(recipe: Recipe, samples: int = 1000) -> Iterator[Path]:
    """Folders that are not there among those of images of so many samples spread over each file that is."""
    found: dict[Path, None] = {}
    for source in {source.path: source for stage in recipe.stages for source in stage.data.sources}.values():
        if not (Path(recipe.data_root) / source.path).exists():
            continue
        records = records_of(recipe, source)
        for number in range(0, len(records), max(1, len(records) // samples)):
            found |= dict.fromkeys(path.parent for path in _images_in(records[number], images_of(recipe, source)))
    return (folder for folder in found if not folder.exists())


def _images_in(record: dict[str, Any], folder: Path) -> Iterator[Path]:
    named = record.get("image") or []
    for path in [named] if isinstance(named, str) else named:
        yield folder / str(path)
