"""A look at every sample of a source, by the same code that training runs but for the resizing of pixels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers.image_processing_utils import BatchFeature

from convllava.data.dataset import FileDataset
from convllava.data.mixture import Mixture, Part
from convllava.data.records import Problem, SampleError, with_images
from convllava.geometry import Size
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.processing import ConvLlavaProcessor

_TOGETHER = 32
"""Samples that a worker takes at a time: neighbours, which lie in one row group."""


@dataclass(frozen=True)
class Finding:
    """What a look at one sample found.

    Attributes:
        index: Of the record in its source.
        id: What the source calls it, else its index.
        tokens: Of the whole sequence, visual ones included; 0 where it cannot be encoded.
        lost: Tokens of those that training does not see.
        images: Height and width of each in pixels; none where one cannot be decoded.
        problem, detail: What is wrong; None and empty where nothing is.
        pixels: Of all images together, as training would resize them; 0 where the sample cannot be encoded.
    """

    index: int
    id: str
    tokens: int
    lost: int
    images: list[tuple[int, int]]
    problem: Problem | None = None
    detail: str = ""
    pixels: int = 0

    @property
    def is_usable(self) -> bool:
        """Whether training takes the sample."""
        return self.problem in (None, "cut")


class Examination(Dataset):
    """The findings of a source, one a record.

    Args:
        part: The source.
        processor: Encodes its samples; not changed.
        max_tokens: Longest sequence; None takes the tokenizer's.
        truncate: Whether a longer one is cut, else it is skipped.
    """

    def __init__(self, part: Part, processor: ConvLlavaProcessor, max_tokens: int | None, truncate: bool) -> None:
        self.name, self.length = part.records.name, len(part.records)
        self.samples = FileDataset(
            Mixture([part]), without_pixels(processor), self.length, max_tokens=max_tokens, truncate=truncate
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Finding:
        images: list[tuple[int, int]] = []
        tokens = 0
        try:
            sample = self.samples.sample(0, index)
            messages = with_images(sample)
            images = _sizes(messages)
            item = self.samples.encoded(sample.id, messages)
            tokens = len(item["input_ids"])
            kept = len(self.samples.within(sample.id, item)["input_ids"])
        except SampleError as error:
            return Finding(index, error.name, tokens, tokens, images, error.problem, error.detail)
        lost, pixels = tokens - kept, _pixels(item)
        if not lost:
            return Finding(index, sample.id, tokens, 0, images, pixels=pixels)
        told = f"{tokens} tokens, of which the last {lost} are cut"
        return Finding(index, sample.id, tokens, lost, images, "cut", told, pixels)


def examine(examination: Examination, workers: int, first: int = 0) -> Iterator[list[Finding]]:
    """The findings in order, from a first record on, some at a time."""
    loader: DataLoader[Any] = DataLoader(
        examination,
        batch_size=_TOGETHER,
        sampler=range(first, len(examination)),
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_alone,
    )
    return iter(loader)


def _alone(worker: int) -> None:
    torch.set_num_threads(1)  # as many workers as cores


def _sizes(messages: list[dict[str, Any]]) -> list[tuple[int, int]]:
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    return [(part["image"].height, part["image"].width) for part in parts]


def _pixels(item: dict[str, Any]) -> int:
    return int(item["image_sizes"].prod(-1).sum()) if "image_sizes" in item else 0


class _Uncoloured(ConvLlavaImageProcessorPil):
    """Sizes as of the real one, which are all that the text depends on; no image is resized."""

    def _preprocess(self, images: list[Any], *args: Any, **kwargs: Any) -> BatchFeature:
        canvases = [self.placement(Size(image.height, image.width), **kwargs).canvas for image in images]
        pixels = np.zeros((len(images), 3, 1, 1), dtype=np.float32)
        return BatchFeature({"pixel_values": pixels, "image_sizes": np.array(canvases, dtype=np.int64)})


def without_pixels(processor: ConvLlavaProcessor) -> ConvLlavaProcessor:
    """A processor that encodes texts exactly as this one does, and spares itself the pixels."""
    lighter = copy.copy(processor)
    lighter.image_processor = _Uncoloured.from_dict(processor.image_processor.to_dict())
    return lighter
