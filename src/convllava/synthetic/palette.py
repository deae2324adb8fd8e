"""The colours of the generated world: named paints, papers and inks, and what stands out from what."""

from __future__ import annotations

import math
import random

Colour = tuple[int, int, int]
"""Red, green and blue, 0-255."""

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (20, 20, 20)
PAINTS: dict[str, Colour] = {
    "red": (215, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (250, 220, 40),
    "green": (35, 155, 60),
    "blue": (35, 85, 215),
    "purple": (125, 40, 165),
    "pink": (250, 140, 190),
    "brown": (115, 65, 30),
    "black": (18, 18, 18),
    "grey": (128, 128, 128),
    "white": (252, 252, 252),
}
INKS: tuple[Colour, ...] = (
    (15, 15, 15), (30, 35, 45), (20, 40, 90), (90, 20, 30),
    (20, 70, 40), (70, 30, 90), (60, 60, 60), (110, 50, 10),
)  # fmt: skip
PAPERS: tuple[Colour, ...] = (
    (255, 255, 255), (250, 250, 245), (245, 240, 225), (235, 240, 250),
    (255, 245, 210), (240, 250, 235), (225, 225, 225), (250, 230, 230),
)  # fmt: skip
VIVID: tuple[Colour, ...] = (
    (170, 30, 35), (20, 70, 150), (15, 100, 60), (90, 40, 120),
    (130, 70, 20), (30, 110, 120), (40, 40, 50), (160, 60, 90),
)  # fmt: skip
WALLS: tuple[Colour, ...] = (
    (120, 130, 125), (190, 185, 175), (150, 110, 90), (95, 120, 80),
    (140, 170, 200), (70, 70, 75), (215, 210, 200),
)  # fmt: skip
DESKS: tuple[Colour, ...] = ((90, 80, 70), (60, 70, 80), (130, 120, 105), (100, 60, 40), (70, 90, 70))
LIGHT_GROUNDS: tuple[Colour, ...] = (
    (245, 245, 245), (255, 255, 255), (215, 215, 215), (215, 230, 250), (220, 240, 215), (250, 240, 205),
)  # fmt: skip
GROUNDS: tuple[Colour, ...] = (
    *LIGHT_GROUNDS, (245, 220, 220), (185, 205, 220), (200, 190, 165),
    (25, 30, 50), (40, 40, 40), (20, 50, 45), (60, 30, 60),
)  # fmt: skip

_LEAST_CONTRAST = 95.0


def jitter(rng: random.Random, colour: Colour, amount: int = 8) -> Colour:
    """`colour` with each channel moved by up to `amount`."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def blend(first: Colour, second: Colour, share: float) -> Colour:
    """The mixture holding `share` of `second`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def paint(rng: random.Random, colour: str) -> Colour:
    """One of the shades of a named colour; greys stay free of tint."""
    if colour in ("black", "grey", "white"):
        return blend(PAINTS[colour], (128, 128, 128), rng.uniform(0, 0.1))
    return jitter(rng, PAINTS[colour], 10)


def luminance(colour: Colour) -> float:
    """Brightness of a colour, 0-255 (ITU-R BT.601)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def contrasting(background: Colour) -> Colour:
    """Black or white, whichever reads better on `background`."""
    return BLACK if luminance(background) > 135 else WHITE


def is_visible(colour: str, ground: Colour) -> bool:
    """Whether something painted in `colour` stands out from `ground`."""
    red, green, blue = (a - b for a, b in zip(PAINTS[colour], ground, strict=True))
    return math.sqrt(0.8 * red * red + 1.4 * green * green + 0.8 * blue * blue) > _LEAST_CONTRAST
