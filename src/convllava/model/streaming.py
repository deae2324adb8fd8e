"""The tower in bands of rows: the memory depends on the width of an image, not on its height. The results are equal.

A 7x7 convolution sees three rows up and down. So a block keeps the last six rows that it received. For each new row it
can then finish one row, three rows late: no row is computed twice, and no neighbour is missing. A stage passes its
finished rows to the next stage. The last stages have large weights and few pixels, so rows wait until there are enough
of them to be worth reading the weights. If a whole map is smaller than the rows that its blocks would keep, the stage
keeps the whole map instead. A band may have any height: it is cut into slices of a few rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from convllava.errors import InputError
from convllava.geometry import Size
from convllava.model import inplace
from convllava.model.inplace import ACCELERATOR_BYTES, HALO
from convllava.model.layers import ConvLlavaVisionEmbeddings, ConvLlavaVisionLayer, ConvLlavaVisionStage
from convllava.model.packed import Grids, join

Rows = list[Tensor]
"""Rows (rows, width, channels) on their way to the next layer: at most one tensor. `_take` empties the list."""
WHOLE_PIXELS = 2**22
"""The largest image, in pixels, that goes through the tower as a whole unless `band_rows` is given."""
_BAND_PIXELS = 2**20
"""Pixels in a band of a larger image."""
_SLICE_BYTES = {"cpu": 2**20}
"""Size of a slice, the rows after the stem that are processed together."""
_MIN_PIXELS = 512
"""Pixels of a stage's map that make it worth reading the weights of the stage."""


def encode(
    stem: ConvLlavaVisionEmbeddings, stages: Sequence[ConvLlavaVisionStage], images: list[Tensor], band_rows: int | None
) -> tuple[Tensor, Grids]:
    """Encode images of (channels, height, width), large ones in bands -> (pixels, channels) and the grids.

    Args:
        band_rows: Rows of pixels in a band, for images of every size; None streams only large images.

    Raises:
        InputError: if `band_rows` is not a positive multiple of the stride.
    """
    stride = _stride(stem, stages)
    banded = band_rows is not None
    if band_rows is not None and (band_rows < stride or band_rows % stride):
        nearest = max(stride, round(band_rows / stride) * stride)
        raise InputError(
            f"`band_rows` {band_rows} is too small or not a multiple of the tower's stride {stride} (the rows of "
            f"pixels of one row of tokens); give {nearest}"
        )
    parts: list[Tensor] = []
    together: list[Tensor] = []
    pixels_together = 0

    def encode_together() -> None:
        nonlocal pixels_together
        if together:
            parts.append(inplace.encode(stem, stages, together)[0])
            together.clear()
            pixels_together = 0

    for image in images:
        pixels = image.shape[1] * image.shape[2]
        if banded or pixels_together + pixels > WHOLE_PIXELS:
            encode_together()
        if banded or pixels > WHOLE_PIXELS:
            rows = band_rows or max(stride, _BAND_PIXELS // image.shape[2] // stride * stride)
            bands = _stream(stem, stages, image.split(rows, dim=1), image.shape[1])
            parts += [band.flatten(0, 1) for band in bands]
        else:
            together.append(image)
            pixels_together += pixels
    encode_together()
    return join(parts), tuple(Size(image.shape[1] // stride, image.shape[2] // stride) for image in images)


def stream(
    stem: ConvLlavaVisionEmbeddings,
    stages: Sequence[ConvLlavaVisionStage],
    bands: Iterable[Tensor],
    height: int | None = None,
) -> Iterator[Tensor]:
    """Check `height` and encode one image that is given in bands; see `ConvLlavaVisionModel.stream`."""
    stride = _stride(stem, stages)
    if height is not None and (height < 1 or height % stride):
        raise InputError(f"`height` {height} is not a multiple of the tower's stride {stride}; resize the image")
    return _stream(stem, stages, bands, height)


@torch.no_grad()
def _stream(
    stem: ConvLlavaVisionEmbeddings, stages: Sequence[ConvLlavaVisionStage], bands: Iterable[Tensor], height: int | None
) -> Iterator[Tensor]:
    streamed: list[_StreamedStage] = []
    for rows, is_last in _embedded(stem, _stride(stem, stages), bands, height):
        streamed = streamed or _streamed_stages(stem, stages, height, rows[0].shape[1])
        for stage in streamed:
            stage.receive(rows)
            rows = stage.advance(is_last)
        yield from rows


def _stride(stem: ConvLlavaVisionEmbeddings, stages: Sequence[ConvLlavaVisionStage]) -> int:
    return stem.patch_size * 2 ** (len(stages) - 1)


def _embedded(
    stem: ConvLlavaVisionEmbeddings, stride: int, bands: Iterable[Tensor], height: int | None
) -> Iterator[tuple[Rows, bool]]:
    """Yield slices of the bands after the stem, and whether each is the last.

    A band is no longer needed when the next one is requested, so the caller may reuse one buffer for all bands.
    """
    patch, weight = stem.patch_size, stem.patch_embeddings.weight
    seen, first_width = 0, 0
    waiting: Rows = []
    for band in bands:
        if band.ndim != 3:
            raise InputError(f"a band is (channels, rows, width); got a tensor of {band.ndim} dimensions")
        rows, width = band.shape[1:]
        if not rows:
            continue
        first_width = first_width or width
        if rows % patch or not width or width % stride or width != first_width:
            raise InputError(
                f"a band of {rows}x{width} pixels does not fit: its rows must be a multiple of {patch}, its width a "
                f"multiple of {stride}, and all bands must have the same width"
            )
        seen += rows
        if height is not None and seen > height:
            raise InputError(f"the bands have more rows than `height` {height}")
        row_bytes = width // patch * len(weight) * weight.dtype.itemsize
        slice_rows = patch * max(HALO, _SLICE_BYTES.get(band.device.type, ACCELERATOR_BYTES) // row_bytes)
        for part in band.split(slice_rows, dim=1):
            if waiting:
                yield waiting, False
            waiting = [_as_rows(inplace.embed(stem, [part.to(weight.dtype)]))]
    if not waiting or seen % stride or seen != (height or seen):
        wanted = f"{height} are needed" if height else f"a multiple of the tower's stride {stride} is needed"
        raise InputError(f"the bands have {seen} rows in all; {wanted}")
    yield waiting, True


def _streamed_stages(
    stem: ConvLlavaVisionEmbeddings, stages: Sequence[ConvLlavaVisionStage], height: int | None, width: int
) -> list[_StreamedStage]:
    """Prepare the stages for an image of this height (in pixels) whose map after the stem is `width` wide.

    A stage keeps its whole map if the map has no more rows than streaming would keep: the rows in the blocks, the rows
        that wait, and copies of both during and after the convolution. The stages after it then keep their whole maps
        too.
    """
    rows = None if height is None else height // stem.patch_size
    streamed: list[_StreamedStage] = []
    whole = False
    for stage in stages:
        if stage.downsampling_layer:
            rows, width = None if rows is None else rows // 2, width // 2
        needed = 2 * HALO * (len(stage.layers) + 1) + 3 * -(-_MIN_PIXELS // width)
        whole = whole or (rows is not None and rows <= needed)
        streamed.append(_StreamedStage(stage, rows if whole else None))
    return streamed


class _StreamedStage:
    """The state of one stage between two slices.

    Args:
        stage: The layers.
        height: Rows of its map if the stage keeps the whole map; else None.
    """

    def __init__(self, stage: ConvLlavaVisionStage, height: int | None) -> None:
        self.stage, self.height = stage, height
        self.blocks = [_StreamedBlock(layer) for layer in stage.layers]
        self.odd: list[Tensor] = []
        self.waiting: list[Tensor] = []
        self.rows = 0

    def receive(self, passed: Rows) -> None:
        """Take rows of the stage before. They are downsampled immediately, so that waiting rows need half the
        memory."""
        if not passed:
            return
        rows = join([*self.odd, *_take(passed)])
        if self.stage.downsampling_layer:
            self.odd = [rows[-1:].clone()] if len(rows) % 2 else []
            rows = rows[: len(rows) // 2 * 2]
        if not len(rows):
            return
        grids = (Size(*rows.shape[:2]),)
        rows = _as_rows(inplace.downsample(self.stage, rows.flatten(0, 1), grids))
        before, self.rows = self.rows, self.rows + len(rows)
        if self.height is None:
            self.waiting.append(rows)
            return
        if not self.waiting:
            self.waiting.append(rows.new_empty(self.height, *rows.shape[1:]))
        self.waiting[0][before : self.rows] = rows

    def advance(self, is_last: bool) -> Rows:
        """Return the finished rows, if any."""
        enough = self.height is None and self.rows and self.rows * self.waiting[0].shape[1] >= _MIN_PIXELS
        passed: Rows = []
        if self.rows and (is_last or enough):
            self.rows = 0
            passed = [join(_take(self.waiting))]
        if self.height is None:
            for streamed in self.blocks:
                streamed.receive(passed, is_last)
                passed = streamed.advance(is_last)
            return passed
        for rows in passed:
            for layer in self.stage.layers:
                inplace.block(layer, rows.flatten(0, 1), (Size(*rows.shape[:2]),))
        return passed


class _StreamedBlock:
    """The state of one block between two slices. It keeps the last six rows it received; the last three of them are not
    finished."""

    def __init__(self, layer: ConvLlavaVisionLayer) -> None:
        self.layer = layer
        self.window: Rows = []

    def receive(self, passed: Rows, is_last: bool) -> None:
        """Append rows to the kept ones, with zeros above the first row and below the last row of the image."""
        known = [*self.window, *_take(passed)]
        if not known:
            return
        edge = known[0].new_zeros(HALO, *known[0].shape[1:])
        self.window = [torch.cat([*([] if self.window else [edge]), *known, *([edge] if is_last else [])])]

    def advance(self, is_last: bool) -> Rows:
        """Return the finished rows, if any."""
        if not self.window or len(self.window[0]) <= 2 * HALO:
            return []
        (window,) = self.window
        self.window = [] if is_last else [window[-2 * HALO :].clone()]
        rows = window[HALO:-HALO]
        pixels = rows.view(-1, rows.shape[-1])
        inplace.mlp(self.layer, pixels, inplace.convolve(self.layer, window.unsqueeze(0), 0), _MIN_PIXELS)
        return [rows]


def _as_rows(embedded: tuple[Tensor, Grids]) -> Tensor:
    """View the pixels of one image as (rows, width, channels)."""
    pixels, (grid,) = embedded
    return pixels.view(*grid, -1)


def _take(passed: Rows) -> Rows:
    """Return the content of the list and empty it, so that only the caller holds the rows and can free their memory."""
    taken = passed.copy()
    passed.clear()
    return taken
