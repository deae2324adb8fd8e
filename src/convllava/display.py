"""Progress bars in the terminal, boxes on pictures, and plots."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from convllava.errors import InputError
from convllava.geometry import Box
from convllava.io import replacing

INK, MUTED, ACCENT = "#1d2433", "#8a93a6", "#2f6fde"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[float], None]]:
    """Show a progress bar. Call the yielded function with the share that is done, 0 to 1."""
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """Return a copy of an image with boxes, which are in pixels; the lines are wider on a larger image."""
    drawn = image.copy()
    for box in boxes:
        ImageDraw.Draw(drawn).rectangle(box, outline=(220, 40, 40), width=max(3, round(min(image.size) / 150)))
    return drawn


@dataclass(frozen=True)
class AnsweredImage:
    """An image, (question, answer) pairs about it, and the boxes of the answers in pixels of the image."""

    image: Image.Image
    turns: list[tuple[str, str]]
    boxes: list[Box]


def draw_answers(answered: Sequence[AnsweredImage]) -> Image.Image:
    """Return one picture: the images next to each other with their boxes, and below each its questions and answers."""
    margin, line_height, font = 24, 32, ImageFont.load_default(22)
    panels = []
    for item in answered:
        lines = [line for question, answer in item.turns for line in (question, f"   {answer}")]
        width = max(item.image.width, *(int(font.getlength(line)) for line in lines)) + 2 * margin
        panel = Image.new("RGB", (width, item.image.height + 3 * margin + line_height * len(lines)), "white")
        panel.paste(draw_boxes(item.image, item.boxes), (margin, margin))
        draw = ImageDraw.Draw(panel)
        for number, line in enumerate(lines):
            top = item.image.height + 2 * margin + number * line_height
            draw.text((margin, top), line, fill="black" if number % 2 == 0 else (20, 80, 170), font=font)
        panels.append(panel)
    sheet = Image.new("RGB", (sum(panel.width for panel in panels), max(panel.height for panel in panels)), "white")
    for left, panel in zip(accumulate((panel.width for panel in panels), initial=0), panels, strict=False):
        sheet.paste(panel, (left, 0))
    return sheet


def check_can_draw(extra: str) -> None:
    """Check, before slow work, that its results can be drawn.

    Args:
        extra: The extra of this package that installs matplotlib.

    Raises:
        InputError: if matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise InputError(f"drawing needs matplotlib; pip install 'convllava[{extra}]'")


@contextmanager
def axes_on(path: Path, title: str, dpi: int = 150) -> Iterator[Any]:
    """Yield axes in the package's plain style; the PNG is written at the end of the block.

    Raises:
        InputError: if matplotlib is missing or the picture cannot be written.
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
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        with replacing(path) as partial:
            figure.savefig(partial, format="png")
    finally:
        plt.close(figure)
