"""Pictures of what a model answered."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from convllava.display import draw_boxes
from convllava.geometry import Box

_MARGIN, _TEXT, _LINE = 24, 22, 32


@dataclass(frozen=True)
class Answered:
    """A page with questions and what the model said; boxes in pixels of the page."""

    image: Image.Image
    turns: list[tuple[str, str]]
    boxes: list[Box]


def draw_answers(pages: list[Answered]) -> Image.Image:
    """The pages side by side with boxes, and the questions and answers below each."""
    panels = [_draw_panel(page) for page in pages]
    width = sum(panel.width for panel in panels)
    sheet = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width
    return sheet


def _draw_panel(page: Answered) -> Image.Image:
    font = ImageFont.load_default(_TEXT)
    lines = [line for question, answer in page.turns for line in (question, f"   {answer}")]
    width = max(page.image.width, *(int(font.getlength(line)) for line in lines)) + 2 * _MARGIN
    height = page.image.height + 3 * _MARGIN + _LINE * len(lines)
    panel = Image.new("RGB", (width, height), "white")
    panel.paste(draw_boxes(page.image, page.boxes), (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(panel)
    top = page.image.height + 2 * _MARGIN
    for index, line in enumerate(lines):
        draw.text((_MARGIN, top + index * _LINE), line, fill="black" if index % 2 == 0 else (20, 80, 170), font=font)
    return panel
