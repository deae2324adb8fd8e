"""The generated world: endless samples, each fixed by split, seed, settings and its index alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping

from convllava.errors import InputError
from convllava.synthetic.augment import degrade
from convllava.synthetic.canvas import Canvas, PageFullError
from convllava.synthetic.charts import draw_bar_chart, draw_line_chart
from convllava.synthetic.forms import draw_form, draw_table
from convllava.synthetic.glyph_sheets import draw_sheet
from convllava.synthetic.questions import Draft
from convllava.synthetic.receipts import draw_receipt, draw_ticket
from convllava.synthetic.sample import Sample, Turn
from convllava.synthetic.scenes import draw_scene
from convllava.synthetic.splits import SPLITS
from convllava.synthetic.style import Context, Drawing
from convllava.synthetic.text_pages import draw_paragraph, draw_sign

KINDS: dict[str, Callable[[Context], Drawing]] = {
    "scene": draw_scene,
    "sign": draw_sign,
    "paragraph": draw_paragraph,
    "receipt": draw_receipt,
    "form": draw_form,
    "table": draw_table,
    "bar_chart": draw_bar_chart,
    "line_chart": draw_line_chart,
}
SHARES = {
    "scene": 0.2,
    "sign": 0.12,
    "paragraph": 0.14,
    "receipt": 0.15,
    "form": 0.12,
    "table": 0.1,
    "bar_chart": 0.1,
    "line_chart": 0.07,
}
SIMPLE_SHARES = {"scene": 0.5, "receipt": 0.3, "bar_chart": 0.2}
SMALLEST, SMALLEST_SIMPLE = 256, 128
_ATTEMPTS = 200


class World:
    """An endless supply of samples.

    split: "train" or "heldout": they share no open word, no font family, no layout and no random number.
    seed: the world's seed.
    size: square root of the pictures' area in pixels, 256 or more (128 if `simple`); sides divide by 64.
    kinds: relative shares of the kinds, those of `SHARES` by default.
    simple: only big scenes, three-line tickets (as kind "receipt") and small bar charts, cleanly printed.
    turns: the most question-answer turns of a sample.
    grounding: share of the turns that ask for a box, where a page has things to ask for.
    darkest: share of its light that the darkest page keeps; 1, and none is dark.
    system_fonts: also print in fonts found on this machine; samples then depend on the machine.

    Raises InputError for a setting that cannot be met, and when the font packages are missing.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 384,
        kinds: Mapping[str, float] | None = None,
        simple: bool = False,
        turns: int = 6,
        system_fonts: bool = False,
        grounding: float = 0.12,
        darkest: float = 1.0,
    ) -> None:
        self.split, self.seed, self.size, self.simple = split, seed, size, simple
        self.turns, self.system_fonts, self.grounding, self.darkest = turns, system_fonts, grounding, darkest
        self.kinds = dict(kinds) if kinds is not None else dict(SIMPLE_SHARES if simple else SHARES)
        self._check()

    def _check(self) -> None:
        least = SMALLEST_SIMPLE if self.simple else SMALLEST
        known = SIMPLE_SHARES if self.simple else SHARES
        unknown = sorted(set(self.kinds) - set(known))
        if self.split not in SPLITS:
            raise InputError(f"World: split is {self.split!r}; choose one of {', '.join(SPLITS)}")
        if self.size < least:
            raise InputError(f"World: size {self.size} is too small to read; choose {least} or more")
        if unknown:
            raise InputError(f"World: kinds has {unknown[0]!r}; choose from {', '.join(known)}")
        if not self.kinds or min(self.kinds.values()) < 0 or sum(self.kinds.values()) <= 0:
            raise InputError("World: kinds must give shares of 0 or more, and one above 0")
        if self.turns < 0:
            raise InputError(f"World: turns is {self.turns}; choose 0 or more")
        if not 0 <= self.grounding < 1:
            raise InputError(f"World: grounding is {self.grounding}; choose a share of 0 or more and below 1")
        if not 0 < self.darkest <= 1:
            raise InputError(f"World: darkest is {self.darkest}; choose a share above 0, at most 1")

    def sample(self, index: int) -> Sample:
        """Sample `index` of this world, whatever was asked before."""
        rng = self._random("sample", index)
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        draw = draw_ticket if self.simple and kind == "receipt" else KINDS[kind]
        return self._finished(index, kind, draw, rng)

    def glyph_sheet(self, index: int) -> Sample:
        """A page full of characters and shapes, kind "sheet", without turns: for dense pre-training."""
        return self._finished(index, "sheet", draw_sheet, self._random("sheet", index))

    def _random(self, purpose: str, index: int) -> random.Random:
        name = f"{self.split}/{self.seed}/{purpose}/{index}"
        return random.Random(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big"))

    def _finished(self, index: int, kind: str, draw: Callable[[Context], Drawing], rng: random.Random) -> Sample:
        context, drawing = self._drawn(draw, rng)
        canvas = drawing.canvas
        if not self.simple:
            degrade(canvas, rng, drawing.steepest, self.darkest)
        return Sample(
            index=index,
            kind=kind,
            image=canvas.image,
            caption=drawing.caption,
            turns=_turns(rng, drawing.drafts, canvas, self.turns, self.grounding),
            glyphs=tuple(canvas.glyphs),
            things=tuple(canvas.things),
            numbered=canvas.numbered(),
            layout=drawing.layout,
            fonts=drawing.fonts or ((context.typeface.family,) if canvas.glyphs else ()),
        )

    def _drawn(self, draw: Callable[[Context], Drawing], rng: random.Random) -> tuple[Context, Drawing]:
        """Deal pages until one fits its picture; most do at once."""
        for _ in range(_ATTEMPTS):
            context = Context(rng, self.split, self.size, self.simple, self.system_fonts)
            try:
                return context, draw(context)
            except PageFullError:
                continue
        raise InputError(f"World: nothing fits a picture of size {self.size}; choose a larger size")


def _turns(rng: random.Random, drafts: list[Draft], canvas: Canvas, most: int, grounding: float) -> tuple[Turn, ...]:
    """Up to `most` of the drafts in random order, tasks in balance, a share `grounding` of them asking for boxes."""
    ground = [draft for draft in drafts if draft.task == "ground"]
    chosen = _balanced(rng, [draft for draft in drafts if draft.task != "ground"])[:most]
    if ground and chosen:
        # Beside the others where there is room, else in place of some of them.
        wanted = min(len(chosen) * grounding / (1 - grounding), most * grounding)
        boxes = min(int(wanted) + (rng.random() < wanted % 1), len(ground), most)
        chosen = chosen[: most - boxes] + rng.sample(ground, boxes)
    rng.shuffle(chosen)
    return tuple(draft.turn(canvas) for draft in chosen)


def _balanced(rng: random.Random, drafts: list[Draft]) -> list[Draft]:
    """The drafts shuffled so that tasks take turns, no question twice."""
    shuffled = rng.sample(drafts, len(drafts))
    unique = list({draft.question: draft for draft in shuffled}.values())
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int, Draft]] = []
    for draft in unique:
        seen[draft.task] = seen.get(draft.task, 0) + 1
        ranked.append((seen[draft.task], len(ranked), draft))
    return [draft for *_, draft in sorted(ranked, key=lambda entry: entry[:2])]
