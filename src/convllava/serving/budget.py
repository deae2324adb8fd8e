"""A budget of pixels: what the tower sees of an image within it, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from convllava.geometry import Placement, Size, visual_tokens
from convllava.inference.assistant import Assistant
from convllava.model.costs import tower_flops


@dataclass(frozen=True)
class Cost:
    """Of one image.

    Attributes:
        canvas: What the tower sees, in pixels.
        visual_tokens: What the language model reads of it.
        flops: Floating-point operations of the tower.
    """

    canvas: Size
    visual_tokens: int
    flops: int

    @property
    def shape(self) -> str:
        return f"{self.canvas.width} \N{MULTIPLICATION SIGN} {self.canvas.height} pixels"


class Budget:
    """What can be chosen where an assistant's own budget is the most.

    Args:
        assistant: Whose image processor and tower.

    Attributes:
        sides: Of squares with as many pixels as a budget has, in steps of one visual token.
    """

    def __init__(self, assistant: Assistant) -> None:
        self._assistant, self._processor = assistant, assistant.processor.image_processor
        stride = self._processor.stride
        most = isqrt(self._processor.budget) // stride * stride
        self.sides = range(min(4 * stride, most), most + 1, stride)

    def pixels(self, side: float) -> int | None:
        """Of the budget with this side; None is the assistant's own."""
        nearest = min(self.sides, key=lambda known: abs(known - side))
        return None if nearest == self.sides[-1] else nearest**2

    def placement(self, size: Size, pixels: int | None) -> Placement:
        """Where an image lies in its canvas."""
        return self._processor.placement(size, **self._processor.within(pixels))

    def cost(self, size: Size, pixels: int | None) -> Cost:
        """Of an image of this height and width."""
        config = self._assistant.model.config
        canvas = self.placement(size, pixels).canvas
        tokens = visual_tokens(canvas, self._processor.stride, self._assistant.processor.row_separator)
        return Cost(canvas, tokens, tower_flops(config.vision_config, canvas))

    def describe(self, size: Size, pixels: int | None) -> str:
        """An image's cost in a line, beside that of the whole budget."""
        cost, whole = self.cost(size, pixels), self.cost(size, None)
        share = "" if pixels is None else f", {cost.flops / whole.flops:.0%} of the whole budget's"
        return (
            f"Seen as {cost.shape}: {cost.visual_tokens} visual tokens, "
            f"{cost.flops / 1e9:.1f} GFLOP in the tower{share}."
        )
