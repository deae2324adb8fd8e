"""The frozen stages of a tower: without gradients, as for inference, and on request once an image."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convllava.model import inplace
from convllava.model.vision_tower import ConvLlavaStageFeatures, ConvLlavaVisionModel
from convllava.training.distributed import process_count
from convllava.training.frozen_features import FEATURES, FeatureStore
from convllava.training.recipe import Recipe, Stage


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
    trained = [int(part.removeprefix("stage")) - 1 for part in stage.learning_rates if part.startswith("stage")]
    return 0 if "stem" in stage.learning_rates else min(trained, default=stages)


def frozen_of(recipe: Recipe, stage: Stage, tower: ConvLlavaVisionModel, output: Path) -> FrozenStages | None:
    """The frozen stages of a tower, where they need not run on the path that trains: on a CPU, whose memory is slow,
    and where `feature_cache_gb` asks for them to be kept."""
    count = 0 if stage.objective == "dense" else frozen_stages(stage, tower.config.num_stages)
    precision = getattr(torch, stage.precision) if tower.device.type == "cpu" else tower.dtype
    if stage.feature_cache_gb:
        return FrozenStages(tower, count, precision, _store(stage, tower, count, output))
    usual = count > 0 and tower.device.type == "cpu" and recipe.sharding == "none" and inplace.is_plain(tower)
    return FrozenStages(tower, count, precision) if usual else None


def _store(stage: Stage, tower: ConvLlavaVisionModel, count: int, output: Path) -> FeatureStore:
    folder = output.absolute().parent / ".cache" / "features" / _digest(stage, tower, count)
    used = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return FeatureStore(folder, (1e9 * stage.feature_cache_gb - used) / process_count())


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
