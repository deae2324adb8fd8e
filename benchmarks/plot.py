"""Pictures of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convllava.display import ACCENT, INK, MUTED, axes_on


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report of the suite `scale` or `first-token` as PNG."""
    with axes_on(path, report["machine"]) as axes:
        (_scale if report["suite"] == "scale" else _first_token)(axes, report)


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
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    for row in report["rows"]:
        ours = row["encoder"].startswith("ConvLLaVA ")
        place = (row["first_token_seconds"], row["visual_tokens"])
        axes.loglog(*place, "o", color=ACCENT if ours else MUTED)
        label = row["encoder"].removeprefix("ConvLLaVA ").replace(" at ", " ")
        settings = {"ha": "center", "textcoords": "offset points", "fontsize": 7, "color": INK}
        axes.annotate(label, place, (0, -13) if ours else (0, 6), **settings)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks([2, 5, 10, 20, 50])
    axes.set_yticks([100, 200, 500, 1000, 2000, 4000])
    axes.set_xlabel("CPU seconds to the first token (blue: ConvLLaVA's towers by size and side)")
    axes.set_ylabel("visual tokens")
