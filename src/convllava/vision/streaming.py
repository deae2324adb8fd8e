"""The tower band by band: an image of any height in memory that its width alone decides, and the same numbers.

A 7x7 convolution sees three rows up and down. So a block that keeps the last six rows it was given can turn every
further band into as many finished rows, three rows late: no row is computed twice, and no neighbour is missing. A stage
passes what is finished on to the next. The last stages have much weight and few pixels; they wait until a band is worth
a reading of the weights, and where a whole map is smaller than what its blocks would keep, it is held in place of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convllava.errors import InputError
from convllava.geometry import Size
from convllava.vision import inference
from convllava.vision.inference import HALO
from convllava.vision.pixels import Grids, join

if TYPE_CHECKING:
    from convllava.vision.model import ConvLlavaVisionLayer, ConvLlavaVisionModel, ConvLlavaVisionStage

WHOLE = 2**22
"""Pixels of the largest image that goes through the tower as a whole unless told otherwise."""
_BAND = 2**20
"""Pixels of a band of a larger one."""
_WORTHWHILE = 1024
"""Pixels of a stage's map for which its weights are worth reading."""


def encode(tower: ConvLlavaVisionModel, images: list[Tensor], band_rows: int | None) -> tuple[Tensor, Grids]:
    """The last feature maps of images (channels, height, width) as one matrix, and their grids."""
    stride = tower.config.stride
    if band_rows is not None and (band_rows < stride or band_rows % stride):
        nearest = max(stride, round(band_rows / stride) * stride)
        raise InputError(
            f"band_rows {band_rows} is too small or no multiple of the tower's stride {stride}, the rows of pixels "
            f"behind one row of tokens; give {nearest}"
        )
    parts: list[Tensor] = []
    for streamed, run in _runs(images, banded=band_rows is not None):
        if streamed:
            (image,) = run
            rows = band_rows or max(stride, _BAND // image.shape[2] // stride * stride)
            parts += [band.flatten(0, 1) for band in _streamed(tower, image.split(rows, dim=1), image.shape[1])]
        else:
            parts.append(inference.encode(tower, run)[0])
    grids = tuple(Size(image.shape[1] // stride, image.shape[2] // stride) for image in images)
    return join(parts), grids


def _runs(images: list[Tensor], banded: bool) -> Iterator[tuple[bool, list[Tensor]]]:
    """Images in their order: (True, one) for each to be streamed, (False, several) for those that go together."""
    together: list[Tensor] = []
    held = 0
    for image in images:
        pixels = image.shape[1] * image.shape[2]
        if together and (banded or held + pixels > WHOLE):
            yield False, together
            together, held = [], 0
        if banded or pixels > WHOLE:
            yield True, [image]
        else:
            together.append(image)
            held += pixels
    if together:
        yield False, together


def stream(tower: ConvLlavaVisionModel, bands: Iterable[Tensor], height: int | None = None) -> Iterator[Tensor]:
    """See `ConvLlavaVisionModel.stream`."""
    with torch.no_grad():
        possible = inference.is_possible(tower)
    if not possible:
        raise InputError("the tower cannot be streamed: under autocast, or with adapters, hooks or quantised layers")
    return _streamed(tower, bands, height)


@torch.no_grad()
def _streamed(tower: ConvLlavaVisionModel, bands: Iterable[Tensor], height: int | None) -> Iterator[Tensor]:
    stages = [_Stage(stage, held) for stage, held in zip(inference.stages_of(tower), _held(tower, height), strict=True)]
    for embedded, is_last in _embedded(tower, bands):
        rows: Tensor | None = embedded
        for stage in stages:
            rows = stage.push(rows, is_last)
        if rows is not None:
            yield rows


def _embedded(tower: ConvLlavaVisionModel, bands: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Bands after the stem (rows, width, channels), and whether each is the last. A band is done with before the next
    is asked for, so that a reader may use one buffer for all."""
    stride, patch = tower.config.stride, tower.config.patch_size
    height, known, waiting = 0, 0, None
    for band in bands:
        if band.ndim != 3:
            raise InputError(f"a band is (channels, rows, width); got a tensor of {band.ndim} dimensions")
        rows, width = band.shape[1:]
        if not rows:
            continue
        if rows % patch or not width or width % stride or width != (known or width):
            raise InputError(
                f"a band of {rows}x{width} pixels does not fit: its rows must be a multiple of {patch}, its width a "
                f"multiple of {stride} and that of the other bands"
            )
        height, known = height + rows, width
        pixels, (grid,) = inference.embed(tower, [band.to(tower.dtype)])
        if waiting is not None:
            yield waiting, False
        waiting = pixels.view(*grid, -1)
    if waiting is None or height % stride:
        raise InputError(f"the bands have {height} rows in all; a multiple of the tower's stride {stride} is needed")
    yield waiting, True


def _held(tower: ConvLlavaVisionModel, height: int | None) -> Iterator[bool]:
    """Per stage, whether its whole map has fewer rows than its blocks would keep; then those after it are held too."""
    held, side = False, tower.config.patch_size
    for depth in tower.config.depths:
        held = held or (height is not None and height // side <= 2 * HALO * depth)
        side *= 2
        yield held


class _Stage:
    """One stage between bands."""

    def __init__(self, stage: ConvLlavaVisionStage, held: bool) -> None:
        self.stage, self.held = stage, held
        self.layers = [_Layer(layer) for layer in inference.layers_of(stage)]
        self.waiting: list[Tensor] = []

    def push(self, rows: Tensor | None, is_last: bool) -> Tensor | None:
        """More rows of the stage before (rows, width, channels) -> the rows that are finished, if any."""
        self.waiting += [] if rows is None else [rows]
        taken = self._take(is_last)
        if taken is None:
            return None
        pixels, (grid,) = inference.downsample(self.stage, taken.flatten(0, 1), (Size(*taken.shape[:2]),))
        if self.held:
            for layer in inference.layers_of(self.stage):
                inference.block(layer, pixels, (grid,))
            return pixels.view(*grid, -1)
        result: Tensor | None = pixels.view(*grid, -1)
        for streamed in self.layers:
            result = streamed.push(result, is_last)
        return result

    def _take(self, is_last: bool) -> Tensor | None:
        """The rows that wait, once they are worth it: an even number of them where the stage halves."""
        if not self.waiting:
            return None
        rows = sum(map(len, self.waiting))
        halves = 2 if self.stage.downsampling_layer else 1
        worthwhile = rows * self.waiting[0].shape[1] >= _WORTHWHILE * halves**2 and not self.held
        ready = rows if is_last else rows // halves * halves if worthwhile else 0
        if not ready:
            return None
        joined = join(self.waiting)
        self.waiting = [joined[ready:].clone()] if ready < rows else []
        return joined[:ready]


class _Layer:
    """One block between bands: the last six rows it was given, of which the last three are not finished."""

    def __init__(self, layer: ConvLlavaVisionLayer) -> None:
        self.layer = layer
        self.kept: Tensor | None = None

    def push(self, rows: Tensor | None, is_last: bool) -> Tensor | None:
        """More rows (rows, width, channels) -> those that are finished, if any."""
        if rows is None:
            return self._finish() if is_last and self.kept is not None else None
        edge = rows.new_zeros(HALO, *rows.shape[1:])
        before = edge if self.kept is None else self.kept
        window = torch.cat([before, rows, edge] if is_last else [before, rows])
        return self._convolve(window, is_last)

    def _finish(self) -> Tensor | None:
        assert self.kept is not None
        edge = self.kept.new_zeros(HALO, *self.kept.shape[1:])
        return self._convolve(torch.cat([self.kept, edge]), True)

    def _convolve(self, window: Tensor, is_last: bool) -> Tensor | None:
        finished = len(window) - 2 * HALO
        if finished <= 0:
            self.kept = window
            return None
        self.kept = None if is_last else window[-2 * HALO :].clone()
        rows = window[HALO : HALO + finished]
        pixels = rows.view(-1, rows.shape[-1])
        inference.mlp(self.layer, pixels, inference.convolve(self.layer, window.unsqueeze(0), 0))
        return rows
