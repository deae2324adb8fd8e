"""What the package's pictures of numbers have in common: their colours and their axes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from convllava.errors import InputError
from convllava.files import replacing

INK, MUTED, ACCENT = "#1d2433", "#8a93a6", "#2f6fde"


def check_can_draw(extra: str) -> None:
    """Refuse what would be drawn in the end.

    Args:
        extra: Which brings matplotlib, among other things.

    Raises:
        InputError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise InputError(f"drawing needs matplotlib; pip install 'convllava[{extra}]'")


@contextmanager
def axes_on(path: Path, title: str, dpi: int = 150) -> Iterator[Any]:
    """Axes to draw on, in the package's plain style; the PNG is written when all is drawn.

    Raises:
        InputError: matplotlib is missing, or the picture cannot be written.
    """
    check_can_draw("eval")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=dpi)
    try:
        yield axes
        axes.grid(alpha=0.25, which="both")
        axes.set_title(title, loc="left", fontsize=8, color=MUTED)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        with replacing(path) as partial:
            figure.savefig(partial, format="png")
    finally:
        plt.close(figure)
