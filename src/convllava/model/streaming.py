"""The tower band by band: an image of any height in memory that its width alone decides, and the same numbers.

A 7x7 convolution sees three rows up and down. So a block that keeps the last six rows it was given can turn every
further rows into as many finished ones, three rows late: no row is computed twice, and no neighbour is missing. A stage
passes what is finished on to the next. The last stages have much weight and few pixels; they wait until there are rows
worth a reading of the weights, and where a whole map is smaller than what its blocks would keep, it is held in place of
them. A band may be of any height: it is cut into slices of a few rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convllava.errors import InputError
from convllava.geometry import Size
from convllava.model import inplace
from convllava.model.inplace import ELSEWHERE, HALO
from convllava.model.packed import Grids, join

if TYPE_CHECKING:
    from convllava.model.vision_tower import ConvLlavaVisionLayer, ConvLlavaVisionModel, ConvLlavaVisionStage

Passed = list[Tensor]
"""Rows (rows, width, channels) on their way from one to the next, at most one tensor; empty once they were taken."""
WHOLE = 2**22
"""Pixels of the largest image that goes through the tower as a whole unless told otherwise."""
_BAND = 2**20
"""Pixels of a band of a larger one."""
_SLICE_BYTES = {"cpu": 2**20}
"""Of the rows after the stem that go on together."""
_WORTHWHILE = 512
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
            parts.append(inplace.encode(tower, run)[0])
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
        possible = inplace.is_possible(tower)
    if not possible:
        raise InputError("the tower cannot be streamed: under autocast, or with adapters, hooks or quantised layers")
    if height is not None and (height < 1 or height % tower.config.stride):
        raise InputError(
            f"height {height} is no multiple of the tower's stride {tower.config.stride}; resize the image"
        )
    return _streamed(tower, bands, height)


@torch.no_grad()
def _streamed(tower: ConvLlavaVisionModel, bands: Iterable[Tensor], height: int | None) -> Iterator[Tensor]:
    stages: list[_Stage] = []
    for passed, is_last in _embedded(tower, bands, height):
        stages = stages or list(_begun(tower, height, passed[0].shape[1]))
        for stage in stages:
            stage.receive(passed)
            passed = stage.advance(is_last)
        yield from passed


def _embedded(
    tower: ConvLlavaVisionModel, bands: Iterable[Tensor], height: int | None
) -> Iterator[tuple[Passed, bool]]:
    """Slices of bands after the stem, and whether each is the last. A band is done with before the next is asked for,
    so that a reader may use one buffer for all."""
    seen, known = 0, 0
    waiting: Passed = []
    for band in bands:
        if band.ndim != 3:
            raise InputError(f"a band is (channels, rows, width); got a tensor of {band.ndim} dimensions")
        rows, width = band.shape[1:]
        if not rows:
            continue
        _check_band(tower, Size(rows, width), known or width)
        seen, known = seen + rows, width
        if height is not None and seen > height:
            raise InputError(f"the bands have more rows than the {height} that `height` says")
        for part in band.split(_slice_rows(tower, band), dim=1):
            if waiting:
                yield waiting, False
            waiting = [_as_rows(inplace.embed(tower, [part.to(tower.dtype)]))]
    if not waiting or seen % tower.config.stride or seen != (height or seen):
        wanted = (
            f"{height} are needed" if height else f"a multiple of the tower's stride {tower.config.stride} is needed"
        )
        raise InputError(f"the bands have {seen} rows in all; {wanted}")
    yield waiting, True


def _check_band(tower: ConvLlavaVisionModel, size: Size, width: int) -> None:
    patch, stride = tower.config.patch_size, tower.config.stride
    if size.height % patch or not size.width or size.width % stride or size.width != width:
        raise InputError(
            f"a band of {size.height}x{size.width} pixels does not fit: its rows must be a multiple of {patch}, its "
            f"width a multiple of {stride} and that of the other bands"
        )


def _slice_rows(tower: ConvLlavaVisionModel, band: Tensor) -> int:
    """Rows of pixels."""
    patch = tower.config.patch_size
    row_bytes = band.shape[2] // patch * tower.config.hidden_sizes[0] * tower.dtype.itemsize
    return patch * max(HALO, _SLICE_BYTES.get(band.device.type, ELSEWHERE) // row_bytes)


def _begun(tower: ConvLlavaVisionModel, height: int | None, width: int) -> Iterator[_Stage]:
    """The stages before the first row of a stem's map so wide.

    A stage is held as a whole where its map has no more rows than would be at work otherwise: those that its blocks
    keep, those that wait until they are worthwhile, and these under the convolution and after it. Those after it are
    then held too.
    """
    rows = None if height is None else height // tower.config.patch_size
    held = False
    for stage in inplace.stages_of(tower):
        if stage.downsampling_layer:
            rows, width = None if rows is None else rows // 2, width // 2
        at_work = 2 * HALO * (len(inplace.layers_of(stage)) + 1) + 3 * -(-_WORTHWHILE // width)
        held = held or (rows is not None and rows <= at_work)
        yield _Stage(stage, rows if held else None)


class _Stage:
    """One stage between slices.

    Args:
        stage: Its layers.
        height: Rows of its map if this is held as a whole.
    """

    def __init__(self, stage: ConvLlavaVisionStage, height: int | None) -> None:
        self.stage, self.height = stage, height
        self.layers = [_Layer(layer) for layer in inplace.layers_of(stage)]
        self.odd: list[Tensor] = []
        self.waiting: list[Tensor] = []
        self.rows = 0

    def receive(self, passed: Passed) -> None:
        """Take rows of the stage before and halve them: they wait in half the memory."""
        if not passed:
            return
        rows = join([*self.odd, *_taken(passed)])
        if self.stage.downsampling_layer:
            self.odd = [rows[-1:].clone()] if len(rows) % 2 else []
            rows = rows[: len(rows) // 2 * 2]
        if len(rows):
            grids = (Size(*rows.shape[:2]),)
            self._wait(_as_rows(inplace.downsample(self.stage, rows.flatten(0, 1), grids)))

    def _wait(self, rows: Tensor) -> None:
        before, self.rows = self.rows, self.rows + len(rows)
        if self.height is None:
            self.waiting.append(rows)
            return
        if not self.waiting:
            self.waiting.append(rows.new_empty(self.height, *rows.shape[1:]))
        self.waiting[0][before : self.rows] = rows

    def advance(self, is_last: bool) -> Passed:
        """The rows that are finished, if any."""
        passed = self._ready(is_last)
        if self.height is None:
            for layer in self.layers:
                layer.receive(passed, is_last)
                passed = layer.advance(is_last)
            return passed
        for rows in passed:
            for whole in inplace.layers_of(self.stage):
                inplace.block(whole, rows.flatten(0, 1), (Size(*rows.shape[:2]),))
        return passed

    def _ready(self, is_last: bool) -> Passed:
        """The rows that wait, once they are worth it."""
        worthwhile = self.height is None and self.rows and self.rows * self.waiting[0].shape[1] >= _WORTHWHILE
        if not self.rows or not (is_last or worthwhile):
            return []
        self.rows = 0
        return [join(_taken(self.waiting))]


class _Layer:
    """One block between slices: the last six rows it was given, of which the last three are not finished."""

    def __init__(self, layer: ConvLlavaVisionLayer) -> None:
        self.layer = layer
        self.window: Passed = []

    def receive(self, passed: Passed, is_last: bool) -> None:
        """Put more rows below those that are kept, and zeros above the first and below the last."""
        known = [*self.window, *_taken(passed)]
        if not known:
            return
        edge = known[0].new_zeros(HALO, *known[0].shape[1:])
        self.window = [torch.cat([*([] if self.window else [edge]), *known, *([edge] if is_last else [])])]

    def advance(self, is_last: bool) -> Passed:
        """The rows that are finished, if any."""
        if not self.window or len(self.window[0]) <= 2 * HALO:
            return []
        (window,) = self.window
        self.window = [] if is_last else [window[-2 * HALO :].clone()]
        rows = window[HALO:-HALO]
        pixels = rows.view(-1, rows.shape[-1])
        inplace.mlp(self.layer, pixels, inplace.convolve(self.layer, window.unsqueeze(0), 0), _WORTHWHILE)
        return [rows]


def _as_rows(embedded: tuple[Tensor, Grids]) -> Tensor:
    """The pixels of one image as (rows, width, channels)."""
    pixels, (grid,) = embedded
    return pixels.view(*grid, -1)


def _taken(passed: Passed) -> Passed:
    """What the list holds, which is empty then: who takes rows owns them, and when done with them gives memory back."""
    taken = passed.copy()
    passed.clear()
    return taken
