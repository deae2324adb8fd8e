"""How large images and sequences are, as a picture."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convllava.data.validation import Finding
from convllava.display import ACCENT, INK, MUTED

_BINS, _TICKS = 40, 5


class Sizes:
    """Heights and widths in pixels of all images, and the tokens of all samples that can be encoded."""

    def __init__(self) -> None:
        self.heights, self.widths, self.tokens = array("q"), array("q"), array("q")

    def add(self, finding: Finding) -> None:
        self.heights.extend(height for height, _ in finding.images)
        self.widths.extend(width for _, width in finding.images)
        if finding.tokens:
            self.tokens.append(finding.tokens)

    def draw(self, path: Path, title: str) -> None:
        """Three histograms as PNG: pixels of the images, their aspect ratios, tokens of the samples."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        heights, widths, tokens = (np.array(values, dtype=float) for values in (self.heights, self.widths, self.tokens))
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), dpi=110)
        _histogram(axes[0], heights * widths / 1e6, "megapixels of an image")
        _histogram(axes[1], widths / heights, "width / height of an image")
        _histogram(axes[2], tokens, "tokens of a sample")
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=INK)
        figure.tight_layout()
        figure.savefig(path, format="png")
        plt.close(figure)


def _histogram(axes: Any, values: NDArray[np.float64], label: str) -> None:
    """On a logarithmic axis, with the median."""
    axes.set_xlabel(label)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not len(values):
        axes.set_yticks([])
        return
    low, high = values.min() / 1.05, values.max() * 1.05
    axes.hist(values, bins=np.geomspace(low, high, _BINS), color=ACCENT)
    axes.set_xscale("log")
    ticks = np.geomspace(low, high, _TICKS)
    axes.set_xticks(ticks, [f"{tick:.2g}" if tick < 10 else f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    middle = float(np.median(values))
    axes.axvline(middle, color=MUTED, linestyle="--", linewidth=1)
    axes.set_title(f"{len(values):,}, median {middle:.3g}", fontsize=8, color=MUTED)
