"""Several sources as one endless stream of samples. The order depends only on the seed and the position.

A resumed run continues at its position. No reader has a state that could be lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convllava.data.formats import Records
from convllava.data.formats.base import WINDOW_BYTES
from convllava.errors import ConfigError

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Attributes:
        records: Its records.
        images: Folder that image paths are relative to.
        repeat: How often an epoch takes each record. With 0.5 it is always the first half.
        weight: Instead of `repeat`: share of an epoch, relative to the weights of the other sources. The next epoch
            continues where the last one ended, so that all records are used in turn.
    """

    records: Records
    images: str = ""
    repeat: float = 1.0
    weight: float | None = None


class Mixture:
    """The samples of all epochs, each epoch in another random order.

    Records that can only be read in row groups (`Records.row_groups`) keep together: the row groups of all sources are
    shuffled, and the rows of as many groups as fit into `WINDOW_BYTES` are mixed with each other. Their positions among
    the other samples are random.

    Args:
        sources: The sources.
        seed: Seed of the order.

    Raises:
        ConfigError: if an epoch would have no sample.
    """

    def __init__(self, sources: Sequence[MixtureSource], seed: int = 0) -> None:
        self.sources, self.seed = list(sources), seed
        weights = [source.weight for source in sources if source.weight is not None]
        if weights:
            # With weights, an epoch is as long as all sources together.
            total = sum(len(source.records) for source in sources) / sum(weights)
            self.counts = [round(total * (source.weight or 0)) for source in sources]
        else:
            self.counts = [round(len(source.records) * source.repeat) for source in sources]
        self.ends = np.cumsum(self.counts)
        if not self.ends[-1]:
            raise ConfigError("an epoch of the data sources has no sample; raise repeat or limit")
        nothing = np.empty(0, dtype=np.int64)
        self._last_epoch: tuple[int, Integers, Integers] = (-1, nothing, nothing)

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return int(self.ends[-1])

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return the number of the source, and of the record in it, at a position of the stream."""
        epoch, number = divmod(position, len(self))
        sources, records = self.epoch(epoch)
        return int(sources[number]), int(records[number])

    def epoch(self, number: int) -> tuple[Integers, Integers]:
        """Return the sources and the records at all positions of an epoch, in order."""
        if self._last_epoch[0] == number:
            return self._last_epoch[1:]
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self))
        lengths = np.array([len(source.records) for source in self.sources])
        # Earlier epochs took so many samples of a source with a weight.
        offsets = np.array(
            [
                count * number if source.weight is not None else 0
                for source, count in zip(self.sources, self.counts, strict=True)
            ]
        )

        # The row group of each sample (-1 for none), and the bytes of each row group.
        found, sizes, known = [], [np.empty(0, dtype=np.int64)], 0
        for source, count, offset, length in zip(self.sources, self.counts, offsets, lengths, strict=True):
            if (groups := source.records.row_groups) is None:
                found.append(np.full(count, -1))
                continue
            repeats, record = np.divmod(np.arange(count) + offset, length)
            own = np.searchsorted(groups.starts, record, side="right") - 1 + len(groups.starts) * repeats
            distinct, own = np.unique(own, return_inverse=True)
            found.append(known + own)
            sizes.append(groups.sizes[distinct % len(groups.starts)])
            known += len(distinct)
        group, size = np.concatenate(found), np.concatenate(sizes)
        positions = np.flatnonzero(group[order] >= 0)
        if len(positions):
            # Sort these samples by the window of their row group, and randomly within a window.
            numbers = np.flatnonzero(group >= 0)
            shuffled = rng.permutation(len(size))
            window = np.empty_like(shuffled)
            window[shuffled] = (np.cumsum(size[shuffled]) - size[shuffled]) // WINDOW_BYTES
            order[positions] = numbers[np.lexsort((rng.random(len(numbers)), window[group[numbers]]))]

        drawn = np.searchsorted(self.ends, order, side="right")
        taken = order - (self.ends - self.counts)[drawn] + offsets[drawn]
        self._last_epoch = (number, drawn, taken % lengths[drawn])
        return self._last_epoch[1:]
