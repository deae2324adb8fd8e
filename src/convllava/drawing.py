"""Boxes on a picture."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw

from convllava.geometry import Box

_COLOUR = (220, 40, 40)


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """A copy with boxes, given in its pixels, in lines that show at its size."""
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    width = max(3, round(min(image.size) / 150))
    for box in boxes:
        draw.rectangle(box, outline=_COLOUR, width=width)
    return drawn
