"""Features of images that frozen stages have made, kept in files, so that they run once an image and not once a step.

    RUNS/.cache/features/DIGEST/ab/abcd....safetensors    beside the output folder RUNS/NAME, one file an image

DIGEST is of the frozen weights and of how they run, a file's name of the pixels as the tower gets them. What is kept of
an image was made of it alone and does not depend on the images that it was with, so a run sees the same numbers
whatever has been kept before, by itself, by another process or by a run that was killed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from convllava.errors import InputError
from convllava.io import replacing
from convllava.training.datasets import Collator

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


def name_of(image: Tensor) -> str:
    """What the features of an image of (3, height, width) are called."""
    content = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=20)
    content.update(image.contiguous().numpy().data)
    return content.hexdigest()
