"""Scenes: coloured shapes on a background, with questions about shape, colour, position and number."""

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops

from convllava.synthetic.canvas import Canvas, PageFullError, Region
from convllava.synthetic.questions import Draft, ask, count, plural
from convllava.synthetic.sample import COLOURS, POSITIONS, Box, position_of
from convllava.synthetic.style import GROUNDS, LIGHT_GROUNDS, Context, Drawing, blend, is_visible, paint


def draw_scene(context: Context) -> Drawing:
    """Draw one to six coloured shapes that neither touch nor hide each other."""
    layout = background, aspect, spread = context.layout("scene")
    rng = context.rng
    ground = rng.choice(LIGHT_GROUNDS if context.simple else GROUNDS)
    canvas = Canvas(*context.aspect("square" if context.simple else aspect), ground)
    if not context.simple:
        size = (canvas.width, canvas.height)
        if background == "gradient":
            other = blend(ground, rng.choice(((255, 255, 255), (0, 0, 0), (120, 140, 160))), 0.18)
            canvas.image.paste(other, (0, 0), _ramp(rng.choice((0, 90, 180, 270)), size))
        elif background == "texture":
            weave = _weave(rng.randrange(4), rng.choice((1, 2, 4)))
            x, y = rng.randrange(-weave.width, 0), rng.randrange(-weave.height, 0)
            tile = Image.new("RGB", size)
            for left in range(x, canvas.width, weave.width):
                for top in range(y, canvas.height, weave.height):
                    tile.paste(weave, (left, top))
            canvas.image.paste(ImageChops.add(canvas.image, tile, 1, -128))

    number = rng.randint(1, 3) if context.simple else rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
    colours = [name for name in COLOURS if is_visible(name, ground)]
    few = rng.sample(colours, min(len(colours), rng.choice((3, 5, 11))))
    kinds = rng.sample(context.shapes, min(len(context.shapes), rng.choice((2, 4, 8))))
    low, high = {"small": (0.1, 0.24), "mixed": (0.1, 0.42), "big": (0.24, 0.45)}[spread]
    if context.simple:
        low, high = 0.28, 0.42
    boxes: list[Box] = []
    for _ in range(number):
        for attempt in range(60):
            length = min(canvas.width, canvas.height) * rng.uniform(low, high) * (1 - attempt / 120)
            # An even number of pixels from a small set, so that the masks of shapes can be cached.
            side = round(length) // 2 * 2 if length < 48 else round(length) // 8 * 8
            x, y = rng.randint(3, canvas.width - side - 3), rng.randint(3, canvas.height - side - 3)
            centres, gap = ((x + side / 2) / canvas.width, (y + side / 2) / canvas.height), side // 10 + 3
            # The centre must be clear of the lines between the nine positions, and the square of other squares.
            if all(abs(centre - line) >= 0.05 for centre in centres for line in (1 / 3, 2 / 3)) and not any(
                x < x1 + gap and x0 < x + side + gap and y < y1 + gap and y0 < y + side + gap
                for x0, y0, x1, y1 in boxes
            ):
                boxes.append((x, y, x + side, y + side))
                break
        else:
            raise PageFullError
    # In reading order of the nine positions, the order of the caption.
    boxes.sort(key=lambda box: POSITIONS.index(position_of(box, canvas.width, canvas.height)))
    regions: list[Region] = []
    for box in boxes:
        colour = rng.choice(few)
        regions.append(canvas.shape(rng.choice(kinds), colour, paint(rng, colour), box))
    for place, region in enumerate(regions, start=1):
        canvas.number(region, place=place)

    parts = [
        f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape} "
        f"at the {position_of(thing.box, canvas.width, canvas.height)}"
        for thing in canvas.things
    ]
    caption = f"{len(parts)} object{'s' if len(parts) > 1 else ''}: {', '.join(parts)}."
    return Drawing(canvas, caption, _drafts(canvas, rng, regions, context.shapes), layout, max_rotation=2.0)


@lru_cache(maxsize=64)
def _ramp(direction: int, size: tuple[int, int]) -> Image.Image:
    """Return a mask that rises from one side of the picture to the other."""
    return Image.linear_gradient("L").rotate(direction).resize(size)


@lru_cache
def _weave(number: int, grain: int) -> Image.Image:
    """Return a faint random pattern around mid-grey with grains of `grain` pixels."""
    grey = np.random.default_rng(number).normal(128, 4, (128, 128)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB").resize((128 * grain, 128 * grain))


def _drafts(canvas: Canvas, rng: random.Random, regions: list[Region], shapes: tuple[str, ...]) -> list[Draft]:
    """Return every question with exactly one answer about a scene whose things could have had any of `shapes`."""
    things = canvas.things
    placed = list(zip(things, regions, strict=True))
    drafts = [count(rng, "count.all", regions)]
    for name in rng.sample(shapes, 3) + [thing.shape for thing in things]:
        of_shape = [region for thing, region in placed if thing.shape == name]
        drafts.append(count(rng, "count.shape", of_shape, shapes=plural(name)))
    for name in rng.sample(COLOURS, 2) + [thing.colour for thing in things]:
        of_colour = [region for thing, region in placed if thing.colour == name]
        drafts.append(count(rng, "count.colour", of_colour, colour=name))
    if len(things) == 1:
        drafts.append(ask(rng, "shape.only", things[0].shape))
    places = [position_of(thing.box, canvas.width, canvas.height) for thing in things]
    for (thing, region), place in zip(placed, places, strict=True):
        only_shape = sum(other.shape == thing.shape for other in things) == 1
        only_colour = sum(other.colour == thing.colour for other in things) == 1
        if places.count(place) == 1:
            drafts.append(ask(rng, "shape.position", thing.shape, position=place))
            drafts.append(ask(rng, "colour.position", thing.colour, position=place))
        if only_colour:
            drafts.append(ask(rng, "shape.colour", thing.shape, colour=thing.colour))
        if only_shape:
            drafts.append(ask(rng, "colour.shape", thing.colour, shape=thing.shape))
        if sum((other.shape, other.colour) == (thing.shape, thing.colour) for other in things) == 1:
            name = thing.shape if only_shape and rng.random() < 0.4 else f"{thing.colour} {thing.shape}"
            drafts.append(ask(rng, "position.thing", place, thing=name))
            drafts.append(ask(rng, "ground.thing", region, thing=name))
    return drafts
