"""Passes of the model filled by what samples cost: as many samples as a budget of tokens and pixels holds.

Within groups of neighbours in the training's order samples are sorted by what they cost, as LLaVA does with
`group_by_modality_length`, and cut into passes; steps are so many passes of similar cost, which come in an order drawn
at random. Processes share the passes of a step, so that none has one more than another, or a longer one to wait for.

The plan is a function of the seed, the costs and the limits alone. A resumed run draws it again and counts to its
place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from convllava.data.mixture import Integers, Mixture
from convllava.errors import InputError

_STEPS_TOGETHER = 50
"""A group has the samples of so many steps (as in LLaVA's trainer), but of a small epoch no more than a quarter."""
UNUSABLE = -1


@dataclass(frozen=True)
class Limits:
    """What a pass holds, and how many of them make a step.

    Attributes:
        passes: Of a step.
        samples: Of a pass, at most.
        tokens: Positions that the language model computes in a pass, padding included, at most; None: any number.
        pixels: Of all images of a pass, at most; None: any number.
        packed: Whether samples lie end to end, so that nothing is padded.
    """

    passes: int
    samples: int
    tokens: int | None = None
    pixels: int | None = None
    packed: bool = False

    def positions(self, count: int, longest: int, together: int) -> int:
        """Tokens that a pass of so many samples computes, whose longest and all together have so many."""
        return together if self.packed else count * longest

    def holds(self, count: int, positions: int, pixels: int) -> bool:
        """Whether a pass may be as large."""
        return (
            count <= self.samples
            and (self.tokens is None or positions <= self.tokens)
            and (self.pixels is None or pixels <= self.pixels)
        )


class Passes:
    """The passes of a whole training, each a list of places in the stream of a mixture.

    A record that cannot be used costs what the next usable one costs, which training takes in its place.

    Args:
        mixture: Which record comes when.
        costs: Of each part of the mixture (records, 2): tokens and pixels; `UNUSABLE` tokens where there is no sample.
        limits: Of a pass.

    Raises:
        InputError: a sample is larger than a pass may be, or none can be used.
    """

    def __init__(self, mixture: Mixture, costs: Sequence[Integers], limits: Limits) -> None:
        self.mixture, self.limits = mixture, limits
        self.costs = np.concatenate(costs)
        self.firsts = np.cumsum([0, *map(len, costs)])[:-1]
        self.group = min(_STEPS_TOGETHER * limits.passes * limits.samples, max(1, len(mixture) // 4))
        _check(mixture, costs, limits)

    def first(self, steps: int) -> list[list[int]]:
        """The passes of so many steps."""
        found: list[list[int]] = []
        for step in self._steps():
            found += step
            if len(found) == steps * self.limits.passes:
                break
        return found

    def steps_of(self, samples: int) -> int:
        """Steps in which so many samples come, the last one filled up."""
        for number, step in enumerate(self._steps(), start=1):
            samples -= sum(map(len, step))
            if samples <= 0:
                return number
        raise AssertionError("the stream of steps has no end")

    def _steps(self) -> Iterator[list[list[int]]]:
        """Steps without end. What is left of a group comes with the next one."""
        left: list[int] = []
        costs: dict[int, tuple[int, int]] = {}
        for number, (places, found) in enumerate(self._groups()):
            costs = {place: costs[place] for place in left} | dict(zip(places, found, strict=True))
            draw = np.random.default_rng([self.mixture.seed, 1, number])
            passes = self._cut(sorted(costs, key=lambda place: (costs[place][1] > 0, costs[place])), costs)
            # A run of passes at any place: the largest ones would else be left again and again.
            spare = len(passes) % self.limits.passes
            begin = self.limits.passes * int(draw.integers(len(passes) // self.limits.passes + 1))
            left = [place for chosen in passes[begin : begin + spare] for place in chosen]
            del passes[begin : begin + spare]
            for step in draw.permutation(len(passes) // self.limits.passes).tolist():
                yield passes[step * self.limits.passes : (step + 1) * self.limits.passes]

    def _groups(self) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Neighbouring places, all of one epoch, and tokens and pixels of the sample at each."""
        count = -(-len(self.mixture) // self.group)
        epoch = 0
        while True:
            tokens, pixels = self._costs(epoch)
            places = range(epoch * len(self.mixture), (epoch + 1) * len(self.mixture))
            for number in range(count):
                own = slice(number * len(places) // count, (number + 1) * len(places) // count)
                yield list(places[own]), list(zip(tokens[own].tolist(), pixels[own].tolist(), strict=True))
            epoch += 1

    def _costs(self, epoch: int) -> Integers:
        """(2, places of an epoch): tokens and pixels of the samples that come there."""
        parts, records = self.mixture.epoch(epoch)
        found = self.costs[self.firsts[parts] + records]
        usable = found[:, 0] != UNUSABLE
        at = np.where(usable, np.arange(len(found)), len(found))
        at = np.minimum.accumulate(at[::-1])[::-1]
        # What comes in place of an epoch's last ones is of the next; no sample is larger than these costs.
        return np.concatenate([found, self.costs.max(0, keepdims=True)])[at].T

    def _cut(self, places: list[int], costs: dict[int, tuple[int, int]]) -> list[list[int]]:
        """Places in their order as passes, each as full as may be."""
        passes: list[list[int]] = []
        longest = together = pixels = 0
        for place in places:
            own_tokens, own_pixels = costs[place]
            longest, together, pixels = max(longest, own_tokens), together + own_tokens, pixels + own_pixels
            count = len(passes[-1]) + 1 if passes else 0
            if passes and self.limits.holds(count, self.limits.positions(count, longest, together), pixels):
                passes[-1].append(place)
            else:
                passes.append([place])
                longest, together, pixels = own_tokens, own_tokens, own_pixels
        return passes


def _check(mixture: Mixture, costs: Sequence[Integers], limits: Limits) -> None:
    """Refuse limits that a single sample exceeds."""
    if all((found[:, 0] == UNUSABLE).all() for found in costs):
        raise InputError("none of the samples can be used; `convllava data check` says why")
    for part, found in zip(mixture.parts, costs, strict=True):
        for column, (name, limit) in enumerate((("tokens", limits.tokens), ("pixels", limits.pixels))):
            number = int(found[:, column].argmax())
            if limit is not None and found[number, column] > limit:
                raise InputError(
                    f"budget.{name} {limit:,} is less than record {number} of {part.records.name} has alone, "
                    f"{found[number, column]:,}; raise it, or lower data.max_tokens or pixels.max_pixels"
                )


class PassDataset(Dataset):
    """The items of a dataset pass by pass; for a loader with one item in a batch.

    Args:
        samples: Its items by their place.
        passes: Of places.
    """

    def __init__(self, samples: Any, passes: Sequence[Sequence[int]]) -> None:
        self.samples = samples
        self.places = np.concatenate([np.asarray(chosen, dtype=np.int64) for chosen in passes])
        self.ends = np.cumsum([len(chosen) for chosen in passes])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[Any]:
        first = int(self.ends[index - 1]) if index else 0
        return [self.samples[place] for place in self.places[first : int(self.ends[index])].tolist()]
