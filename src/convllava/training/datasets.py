"""The samples of a stage: pages of the generated world, or conversations from files."""

import dataclasses
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
from convllava.errors import DataError, InputError
from convllava.synthetic import World
from convllava.training.recipe import Data, Recipe, Source, Stage
from convllava.training.stage import StageRun

_LENGTH_STEP = 32
"""With bfloat16 on a CPU, rows are padded to a multiple of this length: the CPU's library compiles a kernel for each
length, which takes as long as running it."""
Question = tuple[list[dict[str, Any]], str]
"""A conversation up to its first answer, and that answer."""
Collator = Callable[[list[Any]], dict[str, Any]]


def make_dataset(run: StageRun) -> Dataset:
    """Return the samples that a stage trains on, as many as its steps need: from its files, or from the training split
    of the generated world.

    Raises:
        InputError: if a file cannot be read, or the world's settings are bad.
    """
    assert run.stage.steps is not None
    return _dataset(run, "train", run.stage.steps * run.stage.batch_size, run.stage.data.sources)


def make_held_out(run: StageRun) -> Dataset:
    """Return the samples that a stage is evaluated on: from other files, or from the held-out split of the world.

    Raises:
        InputError: see `make_dataset`.
    """
    assert run.stage.evaluation is not None
    return _dataset(run, "heldout", run.stage.evaluation.samples, run.stage.evaluation.sources)


def _dataset(run: StageRun, split: str, length: int, sources: Sequence[Source]) -> Dataset:
    stage, data = run.stage, run.stage.data
    if sources:
        mixture = mixture_of(run, sources)
        length = length if split == "train" else min(length, len(mixture))
        truncate = data.overlong == "truncate"
        return FileDataset(mixture, run.processor, length, max_tokens=data.max_tokens, truncate=truncate)
    world = make_world(data, run.data_seed, split)
    if stage.objective == "dense":
        return DenseDataset(world, run.processor, length, sheets=data.glyph_sheets)
    if stage.objective == "align":
        stride = run.processor.image_processor.stride
        return AlignmentDataset(world, run.processor, length, sheets=data.glyph_sheets, stride=stride)
    return ChatDataset(
        world,
        run.processor,
        length,
        captions=data.captions,
        casual=data.casual_questions,
        images=data.images,
        attention_targets=stage.attention_supervision > 0,
        position_labels=stage.position_label_weight > 0,
        character_labels=stage.character_label_weight > 0,
    )


def make_world(data: Data, seed: int, split: str = "train") -> World:
    """Return the generated world with the settings of a stage's data.

    Raises:
        InputError: if a setting is bad.
    """
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


def make_collator(stage: Stage, processor: Any) -> Collator:
    """Return the function that makes a batch from a list of a dataset's items. With a budget, an item of the training
    samples is a whole micro-batch, but an item of the held-out samples is one sample."""
    if stage.objective != "chat":
        return collate_dense
    rounded = stage.precision == "bfloat16" and stage.budget is None and not torch.accelerator.is_available()
    padded = partial(collate, pad_token_id=processor.tokenizer.pad_token_id, multiple=_LENGTH_STEP if rounded else 1)
    collator: Collator = pack if stage.packing else padded
    return collator if stage.budget is None else partial(_flattened, collator)


def _flattened(collator: Collator, items: list[Any]) -> dict[str, Any]:
    return collator([sample for item in items for sample in (item if isinstance(item, list) else [item])])


def mixture_of(run: StageRun, sources: Sequence[Source] | None = None) -> Mixture:
    """Return the order of the samples of sources, by default of those that the stage trains on.

    Raises:
        InputError: if a source cannot be read.
    """
    return Mixture(mixture_sources(run.recipe, run.stage.data.sources if sources is None else sources), run.data_seed)


def mixture_sources(recipe: Recipe, sources: Sequence[Source]) -> list[MixtureSource]:
    """Open sources for a mixture.

    Raises:
        InputError: if a source cannot be read.
    """
    return [
        MixtureSource(records_of(recipe, source), images_of(recipe, source), source.repeat, source.weight)
        for source in sources
    ]


def records_of(recipe: Recipe, source: Source) -> Records:
    """Open the records of a source.

    Raises:
        InputError: if the source cannot be read.
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
    """Return paths or addresses of a source's files, patterns unchanged; names for `load_dataset` if there is no such
    file."""
    found = [storage.within(recipe.data_root, path) for path in source.paths]
    is_name = source.format == "datasets" and not any(map(storage.exists, found))
    return source.paths if is_name else found


def images_of(recipe: Recipe, source: Source) -> str:
    """Return the folder that the paths of a source's images are relative to."""
    return storage.within(recipe.data_root, source.images)


def stamps_of(recipe: Recipe, source: Source) -> list[tuple[str, str]]:
    """Return a source's files, each with a text that changes if the file does.

    Raises:
        InputError: if a pattern matches no file.
    """
    files = [file for address in addresses_of(recipe, source) for file in storage.expand(address)]
    return [(file, storage.stamp(file)) for file in files]


def questions_of(dataset: ChatDataset | FileDataset, count: int) -> list[Question]:
    """Return the first questions of a dataset that are about an image."""
    found: list[Question] = []
    for index in range(len(dataset)):
        if len(found) == count:
            break
        try:
            messages = dataset.conversation(index)
        except InputError:
            continue  # the evaluation reports it
        end = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
        if any(part["type"] == "image" for message in messages[:end] for part in message["content"]):
            found.append((messages[:end], messages[end]["content"][0]["text"]))
    return found


def distinct_samples(dataset: Any) -> int:
    """Return how many different samples a stage uses."""
    if isinstance(dataset, MicroBatchDataset):
        return min(len(dataset.positions), len(dataset.samples.mixture))
    return min(len(dataset), len(dataset.mixture)) if isinstance(dataset, FileDataset) else len(dataset)


def image_of(item: dict[str, Tensor]) -> Tensor:
    """Return the first image of a dataset's item, (3, height, width)."""
    pixels = item["pixel_values"]
    return pixels if pixels.ndim == 3 else pixels[0]


def count_steps(recipe: Recipe) -> Recipe:
    """Count the samples of the recipe's files, and return the recipe with steps instead of epochs. Stages with a
    budget are left as they are (see `batch_costs.plan_steps`).

    Raises:
        InputError: if a file cannot be read.
    """
    stages = []
    for stage in recipe.stages:
        if stage.epochs is not None and stage.budget is None:
            samples = len(Mixture(mixture_sources(recipe, stage.data.sources)))
            stage = dataclasses.replace(stage, steps=steps_of(samples, stage.epochs, stage.batch_size), epochs=None)
        stages.append(stage)
    return dataclasses.replace(recipe, stages=stages)


def missing_files(recipe: Recipe) -> list[str]:
    """Return the data files and image folders that do not exist, each once."""
    sources = [source for stage in recipe.stages for source in stage.all_sources]
    return list(dict.fromkeys(path for source in sources for path in _missing_of(recipe, source)))


def _missing_of(recipe: Recipe, source: Source) -> Iterator[str]:
    addresses = addresses_of(recipe, source)
    is_name = source.format == "datasets" and addresses == source.paths
    yield from (address for address in addresses if not is_name and not storage.matches(address))
    if not storage.is_remote(images := images_of(recipe, source)) and not storage.exists(images):
        yield images


def check_files(recipe: Recipe) -> None:
    """Check that the recipe's data files and image folders exist.

    Raises:
        DataError: if some do not; the message names them and the folder that paths are relative to.
    """
    if missing := missing_files(recipe):
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        root = recipe.data_root if storage.is_remote(recipe.data_root) else Path(recipe.data_root).absolute()
        raise DataError(
            f"missing data: {named}; paths are relative to data_root, now {root}; change it in the recipe or with "
            "`overrides` data_root=FOLDER"
        )


def missing_image_folders(recipe: Recipe, samples: int = 1000) -> list[Path]:
    """Return the folders of images that do not exist. About `samples` samples, spread over each file, are checked."""
    found: dict[Path, None] = {}
    for source in {source.name: source for stage in recipe.stages for source in stage.all_sources}.values():
        folder = images_of(recipe, source)
        if any(_missing_of(recipe, source)) or storage.is_remote(folder):
            continue
        records = records_of(recipe, source)
        if records.embeds_images:
            continue
        for number in range(0, len(records), max(1, len(records) // samples)):
            named = records[number].get("image")
            for path in named if isinstance(named, list) else [named]:
                if path and isinstance(path, str):  # `data check` reports other values
                    found[(Path(folder) / path).parent] = None
    return [folder for folder in found if not folder.exists()]
