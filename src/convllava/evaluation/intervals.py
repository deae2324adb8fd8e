"""How sure a number is: intervals by the bootstrap, always of the same draws for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
Indices = NDArray[np.int64]


def interval(
    statistic: Callable[[Indices], float],
    strata: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The percentile interval of a statistic under drawing units again, with replacement, within each stratum.

    Args:
        statistic: Indices of drawn units -> the number. Units are what is drawn: questions, or groups of questions
            that belong together.
        strata: Of each unit, the part of the benchmark that it belongs to; the same for all where there are no parts.
        seed: Of the draws.
        resamples: How many draws.
        level: Share of the draws inside.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    draws = np.random.default_rng(seed)
    labels = np.asarray(strata)
    parts = [np.flatnonzero(labels == label) for label in sorted(set(strata))]
    found = [
        statistic(np.concatenate([part[draws.integers(len(part), size=len(part))] for part in parts]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """`interval` of the mean of single units."""
    array = np.asarray(values, dtype=np.float64)
    return interval(lambda drawn: float(array[drawn].mean()), [""] * len(array), seed=seed, resamples=resamples)
