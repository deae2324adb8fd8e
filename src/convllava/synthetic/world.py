"""The generated world: endless samples, each determined by the split, the seed, the settings and its index."""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from convllava.errors import ConfigError, nearest
from convllava.synthetic.augment import degrade
from convllava.synthetic.canvas import PageFullError
from convllava.synthetic.charts import draw_bar_chart, draw_line_chart
from convllava.synthetic.forms import draw_form, draw_table
from convllava.synthetic.glyph_sheets import draw_sheet
from convllava.synthetic.questions import Draft
from convllava.synthetic.receipts import draw_receipt, draw_ticket
from convllava.synthetic.sample import Sample
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
    "scene": 0.2, "sign": 0.12, "paragraph": 0.14, "receipt": 0.15,
    "form": 0.12, "table": 0.1, "bar_chart": 0.1, "line_chart": 0.07,
}  # fmt: skip
SMALLEST, SMALLEST_SIMPLE = 256, 128
SIMPLE_SHARES = {"scene": 0.5, "receipt": 0.3, "bar_chart": 0.2}


@dataclass(eq=False)
class World:
    """Generated pages, signs, charts and scenes with captions, questions and boxes.

        for sample in World(split="train", seed=0):
            sample.image, sample.caption, sample.turns

    Args:
        split: "train" or "heldout". The splits share no open word, no font family, no page layout and no random draw.
        seed: Seed of the world. Two seeds of one split give different samples from the same words, fonts and layouts.
        size: Square root of the area of the pictures, in pixels: 256 or more (128 if `simple`). The aspect ratios
            vary; both sides are multiples of 64.
        kinds: Relative share of each kind of page, such as {"receipt": 2, "table": 1}. By default `SHARES`.
        simple: Generate only scenes of a few large shapes, receipts of three lines, and small bar charts, all cleanly
            printed. A small model learns them in minutes.
        turns: Largest number of question-answer turns of a sample.
        system_fonts: Also use the fonts of this machine. The samples then differ between machines.
        grounding: Share of the turns that ask for a box, if the page has something to ask for.
        min_brightness: Brightness that the darkest pages keep, as a share of the original; 1 darkens no page.

    Raises:
        ConfigError: if a setting is impossible, or (from `sample`) if the font packages are missing.
    """

    split: str = "train"
    seed: int = 0
    size: int = 384
    kinds: Mapping[str, float] | None = None
    simple: bool = False
    turns: int = 6
    system_fonts: bool = False
    grounding: float = 0.12
    min_brightness: float = 1.0

    def __post_init__(self) -> None:
        known, smallest = (SIMPLE_SHARES, SMALLEST_SIMPLE) if self.simple else (SHARES, SMALLEST)
        self.shares = dict(known if self.kinds is None else self.kinds)
        if self.split not in SPLITS:
            raise ConfigError(f"World: `split` is {self.split!r}; choose one of {', '.join(SPLITS)}")
        if self.size < smallest:
            raise ConfigError(f"World: `size` {self.size} is too small to read; choose {smallest} or more")
        if unknown := sorted(set(self.shares) - set(known)):
            hint = nearest(unknown[0], known) or f"; choose from {', '.join(known)}"
            raise ConfigError(f"World: `kinds` has {unknown[0]!r}{hint}")
        if not self.shares or min(self.shares.values()) < 0 or sum(self.shares.values()) <= 0:
            raise ConfigError("World: `kinds` must give shares of 0 or more, and one above 0")
        if self.turns < 0:
            raise ConfigError(f"World: `turns` is {self.turns}; choose 0 or more")
        if not 0 <= self.grounding < 1:
            raise ConfigError(f"World: `grounding` is {self.grounding}; choose a share of 0 or more and below 1")
        if not 0 < self.min_brightness <= 1:
            raise ConfigError(f"World: `min_brightness` is {self.min_brightness}; choose a share above 0, at most 1")

    def __iter__(self) -> Iterator[Sample]:
        """Yield samples 0, 1, 2, ... without end; every iteration starts again at sample 0."""
        return map(self.sample, itertools.count())

    def sample(self, index: int) -> Sample:
        """Return sample `index`. It does not depend on the samples that were drawn before."""
        rng = self._random("sample", index)
        kind = rng.choices(list(self.shares), list(self.shares.values()))[0]
        draw = draw_ticket if self.simple and kind == "receipt" else KINDS[kind]
        return self._draw(index, kind, draw, rng)

    def glyph_sheet(self, index: int) -> Sample:
        """Return a page full of characters and shapes, without turns, for dense pre-training. Its kind is "sheet"."""
        return self._draw(index, "sheet", draw_sheet, self._random("sheet", index))

    def _random(self, purpose: str, index: int) -> random.Random:
        name = f"{self.split}/{self.seed}/{purpose}/{index}"
        return random.Random(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big"))

    def _draw(self, index: int, kind: str, draw: Callable[[Context], Drawing], rng: random.Random) -> Sample:
        for _ in range(200):  # most pages fit at the first attempt
            context = Context(rng, self.split, self.size, self.simple, self.system_fonts)
            try:
                drawing = draw(context)
                break
            except PageFullError:
                continue
        else:
            raise ConfigError(f"World: nothing fits a picture of `size` {self.size}; choose a larger one")
        canvas = drawing.canvas
        if not self.simple:
            degrade(canvas, rng, drawing.max_rotation, self.min_brightness)

        # Choose up to `turns` drafts in random order, with tasks in balance and a share `grounding` of boxes.
        ground = [draft for draft in drawing.drafts if draft.task == "ground"]
        others = [draft for draft in drawing.drafts if draft.task != "ground"]
        unique = list({draft.question: draft for draft in rng.sample(others, len(others))}.values())
        rounds: Counter[str] = Counter()  # how many drafts of each task came before
        ranked: list[tuple[int, Draft]] = []
        for draft in unique:
            rounds[draft.task] += 1
            ranked.append((rounds[draft.task], draft))
        chosen = [draft for _, draft in sorted(ranked, key=lambda entry: entry[0])][: self.turns]
        if ground and chosen:
            # Boxes are added if there is room for more turns; otherwise they replace other turns.
            wanted = min(len(chosen) * self.grounding / (1 - self.grounding), self.turns * self.grounding)
            boxes = min(int(wanted) + (rng.random() < wanted % 1), len(ground), self.turns)
            chosen = chosen[: self.turns - boxes] + rng.sample(ground, boxes)
        rng.shuffle(chosen)
        return Sample(
            index=index,
            kind=kind,
            image=canvas.image,
            caption=drawing.caption,
            turns=tuple(draft.turn(canvas) for draft in chosen),
            glyphs=tuple(canvas.glyphs),
            things=tuple(canvas.things),
            numbered=canvas.numbered(),
            layout=drawing.layout,
            fonts=drawing.fonts or ((context.typeface.family,) if canvas.glyphs else ()),
        )
