"""Frozen stages of the tower: they run without gradients, and on request only once per image.

With `feature_cache_gb` the features of an image are kept in a file:

    RUNS/.cache/features/DIGEST/ab/abcd....safetensors    next to the output folder RUNS/NAME, one file per image

DIGEST identifies the frozen weights, their number of stages and their precision. The file's name is a digest of the
pixels that the tower gets. Features are computed from each image alone, so they do not depend on the other images of a
batch: a run gets the same numbers, whatever this run, another process or a killed run has cached before.
"""

import copy
import hashlib
import itertools
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from convllava.errors import InputError
from convllava.io import replacing
from convllava.model import inplace
from convllava.model.vision_tower import ConvLlavaStageFeatures, ConvLlavaVisionModel
from convllava.training.datasets import Collator
from convllava.training.distributed import process_count
from convllava.training.recipe import Recipe, Stage

FEATURES = "features"
"""The key of a batch that holds, for each image, its features, or their name if they are not cached yet."""


class FeatureStore:
    """A cache of features on disk, up to a size. Any number of processes may read and write.

    Args:
        folder: The folder of the files.
        room: Bytes that this process may still add.
    """

    def __init__(self, folder: Path, room: float) -> None:
        self.folder, self.room = folder, room

    def read(self, name: str) -> Tensor | None:
        """Return the features with that name; None if there are none, or the disk has damaged them."""
        path = self._path(name)
        try:
            return load_file(path)[FEATURES] if path.exists() else None
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, name: str, features: Tensor) -> None:
        """Keep features while there is room. Features that cannot be kept are computed again, which only costs time."""
        if features.nbytes > self.room:
            return
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as partial:
                save_file({FEATURES: features.contiguous().cpu()}, partial)
                self.room -= partial.stat().st_size
        except (OSError, SafetensorError, InputError) as error:
            self.room = 0
            Console(stderr=True).print(
                f"no more features are kept in {self.folder}: {error}", highlight=False, soft_wrap=True
            )

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"


class CachedFeatureCollator:
    """A collator that replaces the pixels of an image by its cached features. It runs in the data loader's processes.

    Args:
        collator: Makes the batch.
        store: The cache.
    """

    def __init__(self, collator: Collator, store: FeatureStore) -> None:
        self.collator, self.store = collator, store

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """Return a batch with `features`; `pixel_values` holds only the images that are not cached, if any."""
        batch = self.collator(items)
        if images := batch.pop("pixel_values", None):
            names = [feature_name(image) for image in images]
            found = [self.store.read(name) for name in names]
            batch[FEATURES] = [name if cached is None else cached for name, cached in zip(names, found, strict=True)]
            if missing := [image for image, cached in zip(images, found, strict=True) if cached is None]:
                batch["pixel_values"] = missing
        return batch


def feature_name(image: Tensor) -> str:
    """Return the name of the features of an image of (3, height, width): a digest of its shape and pixels."""
    content = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=20)
    content.update(image.contiguous().numpy().data)
    return content.hexdigest()


class FrozenStages:
    """The first stages of a tower, all of them frozen.

    Args:
        tower: The tower; its later stages may train.
        count: Number of frozen stages.
        precision: The precision in which they run.
        store: The cache of their features, if any.
    """

    def __init__(
        self, tower: ConvLlavaVisionModel, count: int, precision: torch.dtype, store: FeatureStore | None = None
    ) -> None:
        self.count, self.store = count, store
        if tower.dtype != precision:
            tower = copy.deepcopy(tower)
            tower.encoder.stages = tower.encoder.stages[:count]
            for parameter in tower.parameters():
                parameter.data = parameter.data.to(precision)
        self.tower = tower

    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with features of the frozen stages as `pixel_values`; cached features are used if there are
        any."""
        cached = batch.pop(FEATURES, None)
        images = batch.pop("pixel_values", ())
        if cached is not None:
            waiting = iter(images)
            maps = [self._features(item, next(waiting)) if isinstance(item, str) else item for item in cached]
            features = ConvLlavaStageFeatures.of_maps(maps, self.count)
        elif len(images):
            features = self.tower.begin(list(images), self.count)
        else:
            return batch
        return batch | {"pixel_values": features}

    def _features(self, name: str, image: Tensor) -> Tensor:
        """Return (rows, columns, channels) of an image that was not cached when its batch was loaded."""
        assert self.store is not None
        # Batches are loaded ahead, so an earlier batch may have written it since.
        if (cached := self.store.read(name)) is not None:
            return cached.to(image.device)
        (computed,) = self.tower.begin([image], self.count).maps()
        self.store.write(name, computed)
        return computed


def count_frozen_stages(stage: Stage, stages: int) -> int:
    """Return how many of the tower's `stages` come before the first one that trains."""
    trained = [int(part.removeprefix("stage")) - 1 for part in stage.learning_rates if part.startswith("stage")]
    return 0 if "stem" in stage.learning_rates else min(trained, default=stages)


def make_frozen_stages(recipe: Recipe, stage: Stage, tower: ConvLlavaVisionModel, output: Path) -> FrozenStages | None:
    """Return the frozen stages of a tower if they should run outside of the training path; else None.

    They run outside of it on a CPU, because less memory traffic saves time there, and if `feature_cache_gb` is set.
    """
    count = 0 if stage.objective == "dense" else count_frozen_stages(stage, tower.config.num_stages)
    precision = getattr(torch, stage.precision) if tower.device.type == "cpu" else tower.dtype
    if stage.feature_cache_gb:
        folder = output.absolute().parent / ".cache" / "features" / _digest(stage, tower, count)
        used = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        store = FeatureStore(folder, (1e9 * stage.feature_cache_gb - used) / process_count())
        return FrozenStages(tower, count, precision, store)
    usual = count > 0 and tower.device.type == "cpu" and recipe.sharding == "none" and inplace.is_plain(tower)
    return FrozenStages(tower, count, precision) if usual else None


def _digest(stage: Stage, tower: ConvLlavaVisionModel, count: int) -> str:
    """Return a digest of the frozen weights, their number of stages, their activations, and their precision."""
    config = tower.config
    settings = ("in place", count, stage.precision, tower.dtype, config.hidden_act, config.layer_norm_eps)
    content = hashlib.sha256(repr(settings).encode())
    frozen = (tower.embeddings.named_parameters(), tower.encoder.stages[:count].named_parameters())
    for name, weight in itertools.chain(*frozen):
        content.update(f"{name} {tuple(weight.shape)}".encode())
        content.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return content.hexdigest()[:32]
