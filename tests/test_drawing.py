"""Boxes drawn on pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

from convllava.display import AnsweredImage, draw_answers, draw_boxes


def test_boxes_are_drawn_at_their_position_on_a_copy():
    page = Image.new("RGB", (200, 100), "white")
    drawn = draw_boxes(page, [(20, 10, 60.4, 50), (100, 20, 199, 99)])
    coloured = np.argwhere((np.asarray(drawn) != 255).any(-1))
    assert coloured.min(0).tolist() == [10, 20]
    assert coloured.max(0).tolist() == [99, 199]
    assert drawn.getpixel((20, 30)) == drawn.getpixel((150, 20)) == (220, 40, 40)
    assert drawn.getpixel((40, 30)) == drawn.getpixel((80, 30)) == (255, 255, 255)
    assert page.tobytes() == Image.new("RGB", (200, 100), "white").tobytes()


def test_line_width_grows_with_the_picture():
    reds = [
        (
            np.asarray(draw_boxes(Image.new("RGB", (side, side)), [(0, 0, side - 1, side - 1)]))[side // 2, :, 0] > 0
        ).sum()
        for side in (64, 3000)
    ]
    assert reds == [2 * 3, 2 * 20]


def test_answers_are_drawn_below_their_image():
    page = Image.new("RGB", (300, 100), "green")
    one = draw_answers([AnsweredImage(page, [("What?", "red")], [])])
    two = draw_answers(
        [
            AnsweredImage(page, [("What?", "red"), ("Where?", "left")], [(10, 10, 50, 50)]),
            *[AnsweredImage(page, [("What?", "red")], [])],
        ]
    )
    assert one.crop((24, 24, 324, 124)).tobytes() == page.tobytes()
    assert two.width == 2 * one.width
    assert two.height > one.height
    below = (0, 124, one.width, one.height)
    assert two.crop((one.width, 0, two.width, one.height)).tobytes() == one.tobytes()
    assert np.asarray(one.crop(below)).min() < 128
