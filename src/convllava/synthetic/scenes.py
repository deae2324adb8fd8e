"""Scenes: coloured shapes on a background, with questions about shape, colour, place and number."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops

from convllava.synthetic.canvas import Canvas, PageFullError, Region
from convllava.synthetic.palette import GROUNDS, LIGHT_GROUNDS, Colour, blend, is_visible, paint
from convllava.synthetic.questions import Draft, ask, count, plural
from convllava.synthetic.sample import COLOURS, POSITIONS, Box, Thing, position_of
from convllava.synthetic.style import Context, Drawing

_CLEAREST = 0.05


def draw_scene(context: Context) -> Drawing:
    """One to six coloured shapes that neither touch nor hide each other."""
    background, aspect, spread = context.layout("scene")
    rng = context.rng
    ground = rng.choice(LIGHT_GROUNDS if context.simple else GROUNDS)
    canvas = Canvas(*context.aspect("square" if context.simple else aspect), ground)
    if not context.simple:
        _paint_ground(canvas, rng, background)
    regions = _scatter(canvas, context, ground, spread)
    for place, region in enumerate(regions, start=1):
        canvas.number(region, place=place)
    return Drawing(
        canvas,
        describe(canvas),
        scene_drafts(canvas, rng, regions, context.shapes),
        (background, aspect, spread),
        steepest=2.0,
    )


def _scatter(canvas: Canvas, context: Context, ground: Colour, spread: str) -> list[Region]:
    rng = context.rng
    number = rng.randint(1, 3) if context.simple else rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
    colours = [name for name in COLOURS if is_visible(name, ground)]
    few = rng.sample(colours, min(len(colours), rng.choice((3, 5, 11))))
    kinds = rng.sample(context.shapes, min(len(context.shapes), rng.choice((2, 4, 8))))
    boxes: list[Box] = []
    for _ in range(number):
        boxes.append(_free_box(canvas, context, spread, boxes))
    # Things lie in reading order of the nine positions, as a caption should tell them.
    boxes.sort(key=lambda box: POSITIONS.index(position_of(box, canvas.width, canvas.height)))
    regions: list[Region] = []
    for box in boxes:
        colour = rng.choice(few)
        regions.append(canvas.shape(rng.choice(kinds), colour, paint(rng, colour), box))
    return regions


def _free_box(canvas: Canvas, context: Context, spread: str, taken: list[Box]) -> Box:
    """A square clear of `taken`, its centre clear of the lines between the nine positions."""
    rng, least = context.rng, min(canvas.width, canvas.height)
    low, high = {"small": (0.1, 0.24), "mixed": (0.1, 0.42), "big": (0.24, 0.45)}[spread]
    if context.simple:
        low, high = 0.28, 0.42
    for attempt in range(60):
        side = _coarse(least * rng.uniform(low, high) * (1 - attempt / 120))
        x, y = rng.randint(3, canvas.width - side - 3), rng.randint(3, canvas.height - side - 3)
        box = (x, y, x + side, y + side)
        if (
            _clear(x + side / 2, canvas.width)
            and _clear(y + side / 2, canvas.height)
            and not _hits(box, taken, side // 10 + 3)
        ):
            return box
    raise PageFullError


def _coarse(side: float) -> int:
    """A whole even side, in few enough sizes that drawn masks are found again."""
    return round(side) // 2 * 2 if side < 48 else round(side) // 8 * 8


def _clear(centre: float, side: float) -> bool:
    return all(abs(centre / side - third) >= _CLEAREST for third in (1 / 3, 2 / 3))


def _hits(box: Box, taken: list[Box], gap: float) -> bool:
    return any(
        box[0] < other[2] + gap and other[0] < box[2] + gap and box[1] < other[3] + gap and other[1] < box[3] + gap
        for other in taken
    )


def _paint_ground(canvas: Canvas, rng: random.Random, background: str) -> None:
    size = (canvas.width, canvas.height)
    if background == "gradient":
        other = blend(canvas.background, rng.choice(((255, 255, 255), (0, 0, 0), (120, 140, 160))), 0.18)
        canvas.image.paste(other, (0, 0), _ramp(rng.choice((0, 90, 180, 270)), size))
    elif background == "texture":
        weave = _weave(rng.randrange(4), rng.choice((1, 2, 4)))
        x, y = rng.randrange(-weave.width, 0), rng.randrange(-weave.height, 0)
        tile = Image.new("RGB", size)
        for left in range(x, canvas.width, weave.width):
            for top in range(y, canvas.height, weave.height):
                tile.paste(weave, (left, top))
        canvas.image.paste(ImageChops.add(canvas.image, tile, 1, -128))


@lru_cache(maxsize=64)
def _ramp(direction: int, size: tuple[int, int]) -> Image.Image:
    """A mask rising from one side of the picture to the other."""
    return Image.linear_gradient("L").rotate(direction).resize(size)


@lru_cache
def _weave(number: int, grain: int) -> Image.Image:
    """A faint random pattern around mid-grey, its grains `grain` pixels wide."""
    grey = np.random.default_rng(number).normal(128, 4, (128, 128)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB").resize((128 * grain, 128 * grain))


def article(word: str) -> str:
    """`word` with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def describe(canvas: Canvas) -> str:
    """The caption of a scene, its things in the order they were drawn."""
    parts = [
        f"{article(thing.colour)} {thing.shape} at the {position_of(thing.box, canvas.width, canvas.height)}"
        for thing in canvas.things
    ]
    return f"{len(parts)} object{'s' if len(parts) > 1 else ''}: {', '.join(parts)}."


def scene_drafts(canvas: Canvas, rng: random.Random, regions: list[Region], shapes: tuple[str, ...]) -> list[Draft]:
    """Everything that has one right answer in a scene whose things could have had any of `shapes`."""
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
    for thing, region in placed:
        drafts += _thing_drafts(canvas, rng, thing, region)
    return drafts


def _thing_drafts(canvas: Canvas, rng: random.Random, thing: Thing, region: Region) -> list[Draft]:
    things = canvas.things
    drafts: list[Draft] = []
    place = position_of(thing.box, canvas.width, canvas.height)
    only_shape = sum(other.shape == thing.shape for other in things) == 1
    only_colour = sum(other.colour == thing.colour for other in things) == 1
    if sum(position_of(other.box, canvas.width, canvas.height) == place for other in things) == 1:
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
