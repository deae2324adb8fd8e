"""The generated world: pages, signs, charts and scenes with captions, questions and boxes, drawn when they are needed.

world = World(split="train", seed=0, size=384)
sample = world.sample(0)
sample.image, sample.caption, sample.turns
"""

from convllava.synthetic.questions import closed_vocabulary
from convllava.synthetic.sample import (
    CHARACTERS,
    COLOURS,
    POSITIONS,
    SHAPES,
    TASKS,
    Box,
    Glyph,
    Numbered,
    Sample,
    Thing,
    Turn,
    box_text,
    position_of,
    union,
)
from convllava.synthetic.world import World

__all__ = [
    "CHARACTERS",
    "COLOURS",
    "POSITIONS",
    "SHAPES",
    "TASKS",
    "Box",
    "Glyph",
    "Numbered",
    "Sample",
    "Thing",
    "Turn",
    "World",
    "box_text",
    "closed_vocabulary",
    "position_of",
    "union",
]
