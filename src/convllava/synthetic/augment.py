"""Make a page look photographed: slight rotation, blur, other exposure, noise, JPEG artefacts."""

from __future__ import annotations

import io
import math
import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops

from convllava.synthetic.canvas import Canvas
from convllava.synthetic.sample import Box, Thing

_TILE = 512


def degrade(canvas: Canvas, rng: random.Random, max_rotation: float, min_brightness: float = 1.0) -> None:
    """Make the finished canvas look photographed. The boxes follow its rotation.

    Args:
        canvas: The page; its image and boxes are changed.
        rng: Source of the random numbers.
        max_rotation: Largest rotation, in degrees.
        min_brightness: Smallest share of the brightness that a page keeps; below 1, two of five pages are darkened.
    """
    if rng.random() < 0.25:
        rotate(canvas, rng.uniform(-max_rotation, max_rotation))
    if rng.random() < 0.1:
        canvas.image = _blurred(canvas.image, rng.uniform(0.25, 0.45))
    if rng.random() < 0.3:
        canvas.image = canvas.image.point(_exposure(rng.randint(85, 110), rng.randint(-15, 15)))
    if min_brightness < 1 and rng.random() < 0.4:
        canvas.image = canvas.image.point(_dimmed(round(100 * rng.uniform(min_brightness, 1))))
    if rng.random() < 0.3:
        canvas.image = _noisy(canvas.image, rng)
    if rng.random() < 0.3:
        canvas.image = _jpeg(canvas.image, rng.randint(40, 90))


def rotate(canvas: Canvas, degrees: float) -> None:
    """Rotate picture and boxes counter-clockwise about the centre, by less if a box would leave the picture."""
    boxes = [glyph.box for glyph in canvas.glyphs] + [thing.box for thing in canvas.things]
    for _ in range(4):
        rotated = [_rotated(box, degrees, canvas.width / 2, canvas.height / 2) for box in boxes]
        if all(x0 >= 0 and y0 >= 0 and x1 <= canvas.width and y1 <= canvas.height for x0, y0, x1, y1 in rotated):
            break
        degrees /= 2
    else:
        return
    # The mean of two nearest-neighbour samples looks like bilinear interpolation at a fifth of its cost in Pillow.
    canvas.image = Image.blend(_sampled(canvas, degrees, -0.25), _sampled(canvas, degrees, 0.25), 0.5)
    number = len(canvas.glyphs)
    canvas.glyphs = [replace(glyph, box=box) for glyph, box in zip(canvas.glyphs, rotated[:number], strict=True)]
    canvas.things = [
        Thing(thing.shape, thing.colour, box) for thing, box in zip(canvas.things, rotated[number:], strict=True)
    ]


def _sampled(canvas: Canvas, degrees: float, offset: float) -> Image.Image:
    """Rotate the picture about its centre, and sample each pixel `offset` pixels away from its own centre."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = canvas.width / 2, canvas.height / 2
    # Pillow maps positions of the result to positions of the source, hence the inverse rotation.
    shift_x = x - cosine * (x - offset) + sine * (y - offset)
    shift_y = y - sine * (x - offset) - cosine * (y - offset)
    matrix = (cosine, -sine, shift_x, sine, cosine, shift_y)
    return canvas.image.transform(canvas.image.size, Image.Transform.AFFINE, matrix, fillcolor=canvas.background)


def _blurred(image: Image.Image, share: float) -> Image.Image:
    """Mix each pixel with its neighbours to the right and below."""
    image = Image.blend(image, ImageChops.offset(image, -1, 0), share)
    return Image.blend(image, ImageChops.offset(image, 0, -1), share)


def _rotated(box: Box, degrees: float, middle_x: float, middle_y: float) -> Box:
    """Return a box of the same sides around the rotated centre, which is accurate enough for small angles."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    half_width, half_height = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    x, y = box[0] + half_width - middle_x, box[1] + half_height - middle_y
    x, y = middle_x + cosine * x + sine * y, middle_y - sine * x + cosine * y
    return x - half_width, y - half_height, x + half_width, y + half_height


@lru_cache
def _exposure(contrast: int, brightness: int) -> list[int]:
    table = [min(255, max(0, round((level - 128) * contrast / 100 + 128 + brightness))) for level in range(256)]
    return table * 3


@lru_cache
def _dimmed(percent: int) -> list[int]:
    return [round(level * percent / 100) for level in range(256)] * 3


@lru_cache
def _noise(strength: int, side: int) -> Image.Image:
    noise = np.random.default_rng(strength).normal(128, strength, (side, side, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def _noisy(image: Image.Image, rng: random.Random) -> Image.Image:
    side = -(-(max(image.size) + _TILE // 4) // _TILE) * _TILE
    x, y = rng.randrange(side - image.width), rng.randrange(side - image.height)
    tile = _noise(rng.choice((4, 8, 12)), side)
    return ImageChops.add(image, tile.crop((x, y, x + image.width, y + image.height)), 1, -128)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
