"""What the frozen stages of a tower make of each image: without gradients, as for inference; on request kept in files,
so that they run once an image and not once a step.

    RUNS/.cache/features/DIGEST/ab/abcd....safetensors    beside the output folder RUNS/NAME, one file an image

DIGEST is of the frozen weights and of how they run, a file's name of the pixels as the tower gets them. What is kept of
an image was made of it alone and does not depend on the images that it was with, so a run sees the same numbers
whatever has been kept before, by itself, by another process or by a run that was killed.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from convllava.training.inputs import Collator
from convllava.training.processes import process_count, process_number
from convllava.training.recipe import Recipe, Stage
from convllava.vision import ConvLlavaStageFeatures, ConvLlavaVisionModel, inference

FEATURES = "features"
"""The key under which a batch holds, for each image, its features, or the name of those that are not kept yet."""


class FeatureStore:
    """Files of features, one an image, up to a size. Any number of processes may read and write.

    Args:
        folder: Of the files.
        room: Bytes that this process may still add.
    """

    def __init__(self, folder: Path, room: float) -> None:
        self.folder, self.room = folder, room

    def read(self, name: str) -> Tensor | None:
        """The features of that name; None where there are none, or a disk has damaged them."""
        path = self._path(name)
        try:
            return load_file(path)[FEATURES] if path.exists() else None
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, name: str, features: Tensor) -> None:
        """Keep features, while there is room; what cannot be kept is computed again, which costs nothing but time."""
        if features.nbytes > self.room:
            return
        path = self._path(name)
        # Runs that share the folder all have a process 0, machines that share the disk a process of this id.
        partial = path.with_name(f".{path.name}.{process_number()}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({FEATURES: features.contiguous().cpu()}, partial)
            self.room -= partial.stat().st_size
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            self.room = 0
            Console(stderr=True).print(
                f"no more features are kept in {self.folder}: {error}", highlight=False, soft_wrap=True
            )

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"


class LookUp:
    """A collator that puts in place of an image's pixels what is kept of it. Runs where data are loaded.

    Args:
        collator: Makes the batch.
        store: Where features are kept.
    """

    def __init__(self, collator: Collator, store: FeatureStore) -> None:
        self.collator, self.store = collator, store

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """A batch whose `features` has, for each image, its features, or a name; `pixel_values` has the images that
        are named, if any."""
        batch = self.collator(items)
        if images := batch.pop("pixel_values", None):
            names = [name_of(image) for image in images]
            found = [self.store.read(name) for name in names]
            batch[FEATURES] = [name if kept is None else kept for name, kept in zip(names, found, strict=True)]
            if missing := [image for image, kept in zip(images, found, strict=True) if kept is None]:
                batch["pixel_values"] = missing
        return batch


class FrozenStages:
    """The first stages of a tower, none of which trains.

    Args:
        tower: Whose; its later stages may train.
        count: How many.
        precision: In which they run.
        store: Where features are kept, if they are.
    """

    def __init__(
        self, tower: ConvLlavaVisionModel, count: int, precision: torch.dtype, store: FeatureStore | None = None
    ) -> None:
        self.count, self.store = count, store
        self.tower = tower if tower.dtype == precision else _beginning(tower, count, precision)

    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch, of `LookUp` where features are kept, as the model takes it: its `pixel_values` are features."""
        found = batch.pop(FEATURES, None)
        images = batch.pop("pixel_values", ())
        if found is not None:
            features = ConvLlavaStageFeatures.of_maps(list(self._maps(found, iter(images))), self.count)
        elif len(images):
            features = self.tower.begin(list(images), self.count)
        else:
            return batch
        return batch | {"pixel_values": features}

    def _maps(self, found: Sequence[str | Tensor], images: Iterator[Tensor]) -> Iterator[Tensor]:
        """(rows, columns, channels) of each image: what was kept of it, or what is made of it now."""
        for kept in found:
            yield self._of_image(kept, next(images)) if isinstance(kept, str) else kept

    def _of_image(self, name: str, image: Tensor) -> Tensor:
        assert self.store is not None
        # Batches are loaded ahead: what one was without may have been kept meanwhile.
        if (kept := self.store.read(name)) is not None:
            return kept.to(image.device)
        (computed,) = self.tower.begin([image], self.count).maps()
        self.store.write(name, computed)
        return computed


def _beginning(tower: ConvLlavaVisionModel, count: int, precision: torch.dtype) -> ConvLlavaVisionModel:
    """A copy of a tower without its later stages."""
    beginning = copy.deepcopy(tower)
    beginning.encoder.stages = beginning.encoder.stages[:count]
    for parameter in beginning.parameters():
        parameter.data = parameter.data.to(precision)
    return beginning


def frozen_stages(stage: Stage, stages: int) -> int:
    """How many of a tower's stages come before the first that trains."""
    trained = [int(part.removeprefix("stage")) - 1 for part in stage.trains if part.startswith("stage")]
    return 0 if "stem" in stage.trains else min(trained, default=stages)


def frozen_of(recipe: Recipe, stage: Stage, tower: ConvLlavaVisionModel, output: Path) -> FrozenStages | None:
    """The frozen stages of a tower, where they need not run on the path that trains: on a CPU, whose memory is slow,
    and where `feature_cache_gb` asks for them to be kept."""
    count = 0 if stage.objective == "dense" else frozen_stages(stage, tower.config.num_stages)
    precision = getattr(torch, stage.precision) if tower.device.type == "cpu" else tower.dtype
    if stage.feature_cache_gb:
        return FrozenStages(tower, count, precision, _store(stage, tower, count, output))
    usual = count > 0 and tower.device.type == "cpu" and recipe.sharding == "none" and inference.is_plain(tower)
    return FrozenStages(tower, count, precision) if usual else None


def _store(stage: Stage, tower: ConvLlavaVisionModel, count: int, output: Path) -> FeatureStore:
    folder = output.absolute().parent / ".cache" / "features" / _digest(stage, tower, count)
    used = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return FeatureStore(folder, (1e9 * stage.feature_cache_gb - used) / process_count())


def name_of(image: Tensor) -> str:
    """What the features of an image of (3, height, width) are called."""
    content = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=20)
    content.update(image.contiguous().numpy().data)
    return content.hexdigest()


def _digest(stage: Stage, tower: ConvLlavaVisionModel, count: int) -> str:
    """Of the frozen weights, how many stages they are, what lies between them, and the precision in which they run."""
    config = tower.config
    settings = ("in place", count, stage.precision, tower.dtype, config.hidden_act, config.layer_norm_eps)
    content = hashlib.sha256(repr(settings).encode())
    for name, weight in _frozen(tower, count):
        content.update(f"{name} {tuple(weight.shape)}".encode())
        content.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return content.hexdigest()[:32]


def _frozen(tower: ConvLlavaVisionModel, count: int) -> Iterator[tuple[str, Tensor]]:
    yield from tower.embeddings.named_parameters()
    yield from tower.encoder.stages[:count].named_parameters()
