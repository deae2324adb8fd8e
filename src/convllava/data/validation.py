"""Check every sample of a source with the code that training runs, except that no pixels are resized."""

import copy
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers.image_processing_utils import BatchFeature

from convllava.data.dataset import FileDataset
from convllava.data.mixture import Mixture, MixtureSource
from convllava.data.records import Problem, SampleError, with_images
from convllava.display import ACCENT, INK, MUTED
from convllava.geometry import Size
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.processing import ConvLlavaProcessor

_CHUNK = 32
"""Neighbouring samples that a worker checks at a time; they often share a row group."""


@dataclass(frozen=True)
class Finding:
    """The result of checking one sample.

    Attributes:
        index: Number of the record in its source.
        id: Its id in the source, or its number.
        tokens: Tokens of the whole sequence with visual tokens; 0 if it cannot be encoded.
        lost: Tokens that training does not see.
        images: Height and width of each image in pixels; empty if one cannot be decoded.
        problem, detail: The problem and its description; None and "" if there is none.
        pixels: Pixels of all images together after resizing; 0 if the sample cannot be encoded.
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
        """True if training uses the sample."""
        return self.problem in (None, "cut")


class SourceCheck(Dataset):
    """The findings of a source, one for each record.

    Args:
        source: The source.
        processor: Encodes its samples. It is not changed.
        max_tokens: Longest sequence; None takes the tokenizer's limit.
        truncate: Whether longer samples are cut; otherwise they are skipped.
    """

    def __init__(
        self, source: MixtureSource, processor: ConvLlavaProcessor, max_tokens: int | None, truncate: bool
    ) -> None:
        self.name, self.length = source.records.name, len(source.records)
        self.samples = FileDataset(
            Mixture([source]), without_pixels(processor), self.length, max_tokens=max_tokens, truncate=truncate
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Finding:
        images: list[tuple[int, int]] = []
        tokens = 0
        try:
            sample = self.samples.sample(0, index)
            messages = with_images(sample)
            parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
            images = [(part["image"].height, part["image"].width) for part in parts]
            item = self.samples.encoded(sample.id, messages)
            tokens = len(item["input_ids"])
            kept = len(self.samples.within(sample.id, item)["input_ids"])
        except SampleError as error:
            return Finding(index, error.name, tokens, tokens, images, error.problem, error.detail)
        pixels = int(item["image_sizes"].prod(-1).sum()) if "image_sizes" in item else 0
        lost = tokens - kept
        problem: Problem | None = "cut" if lost else None
        detail = f"{tokens} tokens; the last {lost} are cut" if lost else ""
        return Finding(index, sample.id, tokens, lost, images, problem, detail, pixels)


def check_source(check: SourceCheck, workers: int, first: int = 0) -> Iterator[list[Finding]]:
    """Yield the findings in order from record `first` on, in lists of several; with 0 workers, this process reads."""
    rest = range(first, len(check))
    loader: DataLoader[Any] = DataLoader(check, batch_size=_CHUNK, sampler=rest, num_workers=workers, collate_fn=list)
    return iter(loader)


class _SizesOnly(ConvLlavaImageProcessorPil):
    """Return the sizes of the real image processor, on which the text depends, but resize no image."""

    def _preprocess(self, images: list[Any], *args: Any, **kwargs: Any) -> BatchFeature:
        canvases = [self.placement(Size(image.height, image.width), **kwargs).canvas for image in images]
        pixels = np.zeros((len(images), 3, 1, 1), dtype=np.float32)
        return BatchFeature({"pixel_values": pixels, "image_sizes": np.array(canvases, dtype=np.int64)})


def without_pixels(processor: ConvLlavaProcessor) -> ConvLlavaProcessor:
    """Return a processor that encodes texts exactly like this one, without the cost of the pixels."""
    lighter = copy.copy(processor)
    lighter.image_processor = _SizesOnly.from_dict(processor.image_processor.to_dict())
    return lighter


class SizePlot:
    """Histograms of the sizes of all images and samples."""

    def __init__(self) -> None:
        self.heights, self.widths, self.tokens = array("q"), array("q"), array("q")

    def add(self, finding: Finding) -> None:
        """Count a sample."""
        self.heights.extend(height for height, _ in finding.images)
        self.widths.extend(width for _, width in finding.images)
        if finding.tokens:
            self.tokens.append(finding.tokens)

    def draw(self, path: Path, title: str) -> None:
        """Write three histograms as PNG: pixels and aspect ratios of the images, tokens of the samples."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        heights, widths, tokens = (np.array(values, dtype=float) for values in (self.heights, self.widths, self.tokens))
        figure, plots = plt.subplots(1, 3, figsize=(11, 3.2), dpi=110)
        histograms = (
            (heights * widths / 1e6, "megapixels of an image"),
            (widths / heights, "width / height of an image"),
            (tokens, "tokens of a sample"),
        )
        for axes, (values, label) in zip(plots, histograms, strict=True):
            axes.set_xlabel(label)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            if not len(values):
                axes.set_yticks([])
                continue
            low, high = values.min() / 1.05, values.max() * 1.05
            axes.hist(values, bins=np.geomspace(low, high, 40), color=ACCENT)
            axes.set_xscale("log")
            ticks = np.geomspace(low, high, 5)
            axes.set_xticks(ticks, [f"{tick:.2g}" if tick < 10 else f"{tick:,.0f}" for tick in ticks])
            axes.minorticks_off()
            median = float(np.median(values))
            axes.axvline(median, color=MUTED, linestyle="--", linewidth=1)
            axes.set_title(f"{len(values):,}, median {median:.3g}", fontsize=8, color=MUTED)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=INK)
        figure.tight_layout()
        figure.savefig(path, format="png")
        plt.close(figure)
