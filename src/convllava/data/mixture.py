"""Several sources as one endless stream of samples, whose order is a function of the seed and the place alone.

A run that resumes counts to its place and goes on; no reader has a state that could be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convllava.data.formats import Records
from convllava.data.formats.base import WINDOW_BYTES
from convllava.errors import InputError

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
        records: What it holds.
        images: Folder that the paths of its images are relative to.
        repeat: How often an epoch takes each record; of 0.5 always the first half.
        weight: In place of `repeat`: its share of an epoch, beside the weights of the others. Epochs go on where the
            last one ended, so that all records come in their turn.
    """

    records: Records
    images: str = ""
    repeat: float = 1.0
    weight: float | None = None


class Mixture:
    """The samples of all epochs, each in an order of its own.

    Records that lie in blocks (`Records.blocks`) come block by block: the blocks of all sources are shuffled, and as
    many as `WINDOW_BYTES` hold are mixed with each other. Where they come among the others is drawn freely.

    Raises:
        InputError: an epoch has no sample.
    """

    def __init__(self, parts: Sequence[Part], seed: int = 0) -> None:
        self.parts, self.seed = list(parts), seed
        self.counts = _counts(self.parts)
        self.ends = np.cumsum(self.counts)
        if not self.ends[-1]:
            raise InputError("an epoch of the data sources has no sample; raise repeat or limit")
        nothing = np.empty(0, dtype=np.int64)
        self._drawn: tuple[int, Integers, Integers] = (-1, nothing, nothing)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self.ends[-1])

    def __getitem__(self, place: int) -> tuple[int, int]:
        """The number of the part, and of its record, at a place in the stream."""
        epoch, number = divmod(place, len(self))
        parts, records = self.epoch(epoch)
        return int(parts[number]), int(records[number])

    def epoch(self, number: int) -> tuple[Integers, Integers]:
        """The parts, and the records of them, at all places of an epoch, in their order."""
        if self._drawn[0] != number:
            drawn = self._order(number)
            parts = np.searchsorted(self.ends, drawn, side="right")
            passed = np.array([self._passed(part, number) for part in range(len(self.parts))])
            lengths = np.array([len(part.records) for part in self.parts])
            turns = drawn - (self.ends - self.counts)[parts] + passed[parts]
            self._drawn = (number, parts, turns % lengths[parts])
        return self._drawn[1], self._drawn[2]

    def _passed(self, part: int, epoch: int) -> int:
        """How many samples earlier epochs took of a source that goes on where they ended."""
        return epoch * self.counts[part] if self.parts[part].weight is not None else 0

    def _order(self, epoch: int) -> Integers:
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(len(self))
        block, size = self._blocks(epoch)
        places = np.flatnonzero(block[order] >= 0)
        if len(places):
            numbers = np.flatnonzero(block >= 0)
            order[places] = numbers[_block_by_block(block[numbers], size, draw)]
        return order

    def _blocks(self, epoch: int) -> tuple[Integers, Integers]:
        """Of each sample of an epoch the block that it lies in, -1 for none, and the bytes of each block."""
        found, sizes, known = [], [], 0
        for number, (part, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            if (blocks := part.records.blocks) is None:
                found.append(np.full(count, -1))
                continue
            times, record = np.divmod(np.arange(count) + self._passed(number, epoch), len(part.records))
            own = np.searchsorted(blocks.starts, record, side="right") - 1 + len(blocks.starts) * times
            distinct, own = np.unique(own, return_inverse=True)
            found.append(known + own)
            sizes.append(blocks.sizes[distinct % len(blocks.starts)])
            known += len(distinct)
        return np.concatenate(found), np.concatenate([np.empty(0, dtype=np.int64), *sizes])


def _counts(parts: Sequence[Part]) -> list[int]:
    """Samples that an epoch takes of each source. Weights share what the sources hold together."""
    weights = [part.weight for part in parts if part.weight is not None]
    if weights:
        whole = sum(len(part.records) for part in parts) / sum(weights)
        return [round(whole * (part.weight or 0)) for part in parts]
    return [round(len(part.records) * part.repeat) for part in parts]


def _block_by_block(block: Integers, size: Integers, draw: np.random.Generator) -> Integers:
    """An order of samples in which those of a window of blocks come together.

    Args:
        block: The block of each sample.
        size: Bytes of each block.
    """
    shuffled = draw.permutation(len(size))
    before = np.cumsum(size[shuffled]) - size[shuffled]
    window = np.empty_like(shuffled)
    window[shuffled] = before // WINDOW_BYTES
    return np.lexsort((draw.random(len(block)), window[block]))
