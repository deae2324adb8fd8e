"""Micro-batches that fill a budget of tokens and pixels.

Within groups of neighbours in the training order, samples are sorted by cost, as LLaVA does with
`group_by_modality_length`, and cut into micro-batches. A step is a fixed number of micro-batches of similar cost, and
the steps of a group come in random order. Processes share the micro-batches of a step equally, so none waits long.

The plan depends only on the seed, the costs and the budget. A resumed run computes the same plan again and continues at
its position.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from convllava.data.mixture import Integers, Mixture
from convllava.errors import ConfigError, DataError

UNUSABLE = -1
"""This number of tokens marks a sample that training skips."""


@dataclass(frozen=True)
class MicroBatchBudget:
    """The limits of a micro-batch, and the number of micro-batches of a step.

    Attributes:
        micro_batches: Micro-batches per optimiser step.
        samples: Most samples of a micro-batch.
        tokens: Most positions that the language model computes in a micro-batch, with padding; None sets no limit.
        pixels: Most pixels of all images of a micro-batch; None sets no limit.
        packed: Whether samples are concatenated without padding.
    """

    micro_batches: int
    samples: int
    tokens: int | None = None
    pixels: int | None = None
    packed: bool = False

    def cut(self, positions: Sequence[int], costs: dict[int, tuple[int, int]]) -> list[list[int]]:
        """Cut positions of the stream, in their order, into micro-batches that are as full as the budget allows.

        `costs` holds the tokens and the pixels of the sample at each position.
        """
        found: list[list[int]] = []
        longest = total = pixels = 0
        for position in positions:
            own_tokens, own_pixels = costs[position]
            longest, total, pixels = max(longest, own_tokens), total + own_tokens, pixels + own_pixels
            count = len(found[-1]) + 1 if found else 0
            computed = total if self.packed else count * longest
            if (
                found
                and count <= self.samples
                and (self.tokens is None or computed <= self.tokens)
                and (self.pixels is None or pixels <= self.pixels)
            ):
                found[-1].append(position)
            else:
                found.append([position])
                longest, total, pixels = own_tokens, own_tokens, own_pixels
        return found


class MicroBatchPlan:
    """The micro-batches of a whole training, each a list of positions in the stream of a mixture.

    A sample that cannot be used costs as much as the next usable one, which training takes instead.

    Args:
        mixture: The order of the records.
        costs: For each source of the mixture (records, 2): tokens and pixels, with `UNUSABLE` tokens if training skips
            the record.
        budget: The limits of a micro-batch.

    Raises:
        ConfigError: if a single sample exceeds the budget.
        DataError: if no sample can be used.
    """

    def __init__(self, mixture: Mixture, costs: Sequence[Integers], budget: MicroBatchBudget) -> None:
        self.mixture, self.budget = mixture, budget
        self.costs = np.concatenate(costs)
        self.firsts = np.cumsum([0, *map(len, costs)])[:-1]
        # A group has the samples of 50 steps, as in LLaVA's trainer, but at most a quarter of an epoch.
        self.group = min(50 * budget.micro_batches * budget.samples, max(1, len(mixture) // 4))
        if (self.costs[:, 0] == UNUSABLE).all():
            raise DataError("none of the samples can be used; `convllava data check` lists the reasons")
        for source, found in zip(mixture.sources, costs, strict=True):
            for column, (name, limit) in enumerate((("tokens", budget.tokens), ("pixels", budget.pixels))):
                number = int(found[:, column].argmax())
                if limit is not None and found[number, column] > limit:
                    raise ConfigError(
                        f"budget.{name} {limit:,} is less than record {number} of {source.records.name} needs alone, "
                        f"{found[number, column]:,}; raise it, or lower data.max_tokens or pixels.max_pixels"
                    )

    def first(self, steps: int) -> list[list[int]]:
        """Return the micro-batches of the first steps."""
        return [batch for step in itertools.islice(self._steps(), steps) for batch in step]

    def steps_of(self, samples: int) -> int:
        """Return the number of steps that contain this many samples. The last step is filled up."""
        totals = itertools.accumulate(sum(map(len, step)) for step in self._steps())
        return next(number for number, total in enumerate(totals, start=1) if total >= samples)

    def _steps(self) -> Iterator[list[list[int]]]:
        """Yield steps without end. Samples that do not fill a step of their group join the next group."""
        per_step, length = self.budget.micro_batches, len(self.mixture)
        count = -(-length // self.group)
        left: list[int] = []
        costs: dict[int, tuple[int, int]] = {}
        for number in itertools.count():
            epoch, part = divmod(number, count)
            if not part:
                sources, records = self.mixture.epoch(epoch)
                found = self.costs[self.firsts[sources] + records]
                # The cost of the next usable sample of the epoch. The last samples can be replaced by one of the next
                # epoch, so they get the largest cost of all.
                at = np.where(found[:, 0] != UNUSABLE, np.arange(length), length)
                at = np.minimum.accumulate(at[::-1])[::-1]
                found = np.concatenate([found, self.costs.max(0, keepdims=True)])[at]
            start, stop = part * length // count, (part + 1) * length // count
            costs = {position: costs[position] for position in left}
            for position, (tokens, pixels) in enumerate(found[start:stop].tolist(), start=epoch * length + start):
                costs[position] = (tokens, pixels)
            rng = np.random.default_rng([self.mixture.seed, 1, number])
            # Samples without images first, then by tokens and pixels.
            in_order = sorted(costs, key=lambda position: (costs[position][1] > 0, costs[position]))
            batches = self.budget.cut(in_order, costs)
            # The samples that are left over come from a random place. Otherwise they would always be the largest ones.
            leftover = len(batches) % per_step
            begin = per_step * int(rng.integers(len(batches) // per_step + 1))
            left = [position for batch in batches[begin : begin + leftover] for position in batch]
            del batches[begin : begin + leftover]
            for step in rng.permutation(len(batches) // per_step).tolist():
                yield batches[step * per_step : (step + 1) * per_step]


class MicroBatchDataset(Dataset):
    """The items of `samples`, one micro-batch at a time, each given by its positions; for loaders of batch size 1."""

    def __init__(self, samples: Any, micro_batches: Sequence[Sequence[int]]) -> None:
        self.samples = samples
        self.positions = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in micro_batches])
        self.ends = np.cumsum([len(batch) for batch in micro_batches])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[Any]:
        first = int(self.ends[index - 1]) if index else 0
        return [self.samples[position] for position in self.positions[first : int(self.ends[index])].tolist()]
