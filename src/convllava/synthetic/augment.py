"""Make a page look photographed: slight rotation, blur, other exposure, noise, JPEG artefacts."""

import io
import math
import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops

from convllava.synthetic.canvas import Canvas
from convllava.synthetic.sample import Box


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
    image = canvas.image
    if rng.random() < 0.1:  # blur: mix each pixel with its neighbours to the right and below
        share = rng.uniform(0.25, 0.45)
        for offset in ((-1, 0), (0, -1)):
            image = Image.blend(image, ImageChops.offset(image, *offset), share)
    if rng.random() < 0.3:  # other exposure
        contrast, brightness = rng.randint(85, 110), rng.randint(-15, 15)
        levels = [round((level - 128) * contrast / 100 + 128 + brightness) for level in range(256)]
        image = image.point([min(255, max(0, level)) for level in levels] * 3)
    if min_brightness < 1 and rng.random() < 0.4:
        percent = round(100 * rng.uniform(min_brightness, 1))
        image = image.point([round(level * percent / 100) for level in range(256)] * 3)
    if rng.random() < 0.3:
        side = -(-(max(image.size) + 128) // 512) * 512  # few different sizes, so that the noise can be cached
        x, y = rng.randrange(side - image.width), rng.randrange(side - image.height)
        noise = _noise(rng.choice((4, 8, 12)), side).crop((x, y, x + image.width, y + image.height))
        image = ImageChops.add(image, noise, 1, -128)
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(40, 90))
        image = Image.open(buffer).convert("RGB")
    canvas.image = image


def rotate(canvas: Canvas, degrees: float) -> None:
    """Rotate picture and boxes counter-clockwise about the centre, by less if a box would leave the picture."""
    middle_x, middle_y = canvas.width / 2, canvas.height / 2
    boxes = [glyph.box for glyph in canvas.glyphs] + [thing.box for thing in canvas.things]
    for _ in range(4):
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        rotated: list[Box] = []
        for x0, y0, x1, y1 in boxes:
            # A box of the same sides around the rotated centre is accurate enough for small angles.
            half_width, half_height = (x1 - x0) / 2, (y1 - y0) / 2
            x, y = x0 + half_width - middle_x, y0 + half_height - middle_y
            x, y = middle_x + cosine * x + sine * y, middle_y - sine * x + cosine * y
            rotated.append((x - half_width, y - half_height, x + half_width, y + half_height))
        if all(x0 >= 0 and y0 >= 0 and x1 <= canvas.width and y1 <= canvas.height for x0, y0, x1, y1 in rotated):
            break
        degrees /= 2
    else:
        return
    sampled: list[Image.Image] = []
    for offset in (-0.25, 0.25):  # each pixel is sampled at this distance from its own centre
        # Pillow maps positions of the result to positions of the source, hence the inverse rotation.
        shift_x = middle_x - cosine * (middle_x - offset) + sine * (middle_y - offset)
        shift_y = middle_y - sine * (middle_x - offset) - cosine * (middle_y - offset)
        matrix = (cosine, -sine, shift_x, sine, cosine, shift_y)
        affine = Image.Transform.AFFINE
        sampled.append(canvas.image.transform(canvas.image.size, affine, matrix, fillcolor=canvas.background))
    # The mean of two nearest-neighbour samples looks like bilinear interpolation at a fifth of its cost in Pillow.
    canvas.image = Image.blend(sampled[0], sampled[1], 0.5)
    moved = iter(rotated)
    canvas.glyphs = [replace(glyph, box=next(moved)) for glyph in canvas.glyphs]
    canvas.things = [replace(thing, box=next(moved)) for thing in canvas.things]


@lru_cache
def _noise(strength: int, side: int) -> Image.Image:
    noise = np.random.default_rng(strength).normal(128, strength, (side, side, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))
