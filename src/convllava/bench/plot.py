"""Pictures of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convllava.errors import InputError

INK, MUTED, ACCENT = "#1d2433", "#8a93a6", "#2f6fde"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report of the suite `scale` or `first-token` as PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib; pip install 'convllava[bench]', or leave out --output") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    (_scale if report["suite"] == "scale" else _first_token)(axes, report)
    axes.grid(alpha=0.25, which="both")
    axes.set_title(report["machine"], loc="left", fontsize=8, color=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _scale(axes: Any, report: dict[str, Any]) -> None:
    """Seconds and memory against megapixels, both on logarithmic axes."""
    rows = sorted(report["rows"], key=lambda row: row["height"] * row["width"])
    pixels = [row["height"] * row["width"] / 1e6 for row in rows]
    axes.loglog(pixels, [row["seconds"] for row in rows], "o-", color=ACCENT, label="CPU seconds")
    axes.loglog(pixels, [row["mb"] / 1000 for row in rows], "s--", color=MUTED, label="GB of memory")
    for x, row in zip(pixels, rows, strict=True):
        axes.annotate(
            f"{row['width']}x{row['height']}", (x, row["seconds"]), (0, 7), textcoords="offset points", fontsize=7
        )
    axes.set_xlabel(f"megapixels (time grows with their power {report['exponent']})")
    axes.legend(frameon=False)


def _first_token(axes: Any, report: dict[str, Any]) -> None:
    """Seconds to the first token against visual tokens; other models in grey."""
    for row in report["rows"]:
        color = ACCENT if row["encoder"].startswith("ConvLLaVA") else MUTED
        axes.loglog(row["first_token_seconds"], row["visual_tokens"], "o", color=color)
        place = (row["first_token_seconds"], row["visual_tokens"])
        axes.annotate(row["encoder"], place, (5, 3), textcoords="offset points", fontsize=7, color=INK)
    axes.set_xlabel("CPU seconds to the first token")
    axes.set_ylabel("visual tokens")
