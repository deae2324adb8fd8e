"""Glyph sheets: pages densely covered with words, single characters and shapes, for dense pre-training."""

from convllava.synthetic.canvas import Canvas
from convllava.synthetic.fonts import font, typefaces
from convllava.synthetic.questions import SIMPLE_ITEMS
from convllava.synthetic.sample import CHARACTERS, COLOURS
from convllava.synthetic.style import (
    BLACK,
    INKS,
    PAPERS,
    VIVID,
    Context,
    Drawing,
    contrasting,
    is_visible,
    jitter,
    paint,
)
from convllava.synthetic.words import DAYS, MONTHS, cents, code, date, money

_SIZES = (12, 14, 15, 16, 16, 18, 18, 20, 22, 24, 24, 28, 32, 36, 44, 56, 72)
_SIZES_SIMPLE = (15, 16, 16, 18, 20, 24, 26, 28, 32)
_ROLES = ("item", "name", "noun", "adjective", "city", "surname")


def draw_sheet(context: Context) -> Drawing:
    """Draw bands of text from edge to edge, each in its own size, face and colours, with shapes among the words."""
    rng = context.rng
    canvas = Canvas(*context.extent(0.5, 2.0), rng.choice(PAPERS))
    faces = typefaces(context.split, context.simple, context.system_fonts)
    sizes = _SIZES_SIMPLE if context.simple else _SIZES
    y, used = 0, set()
    while canvas.height - y >= max(20, 1.4 * sizes[0]):
        size = rng.choice([size for size in sizes if size * 1.4 <= canvas.height - y])
        typeface = rng.choice(faces)
        used.add(typeface.family)
        face = font(rng.choice((typeface.regular, typeface.bold)), size)
        height = min(round(size * rng.uniform(1.3, 1.7)), canvas.height - y)
        if context.simple:
            paper, ink = rng.choice(PAPERS), rng.choice(INKS)
        elif (chance := rng.random()) < 0.55:
            paper, ink = jitter(rng, rng.choice(PAPERS)), rng.choice(INKS)
        elif chance < 0.75:
            paper, ink = jitter(rng, rng.choice(INKS)), rng.choice(PAPERS)
        else:
            paper = jitter(rng, rng.choice(VIVID))
            ink = contrasting(paper)
        canvas.draw.rectangle((0, y, canvas.width, y + height), fill=paper)

        x = rng.randint(3, 10)
        while x < canvas.width - size:
            if rng.random() < 0.12:  # a shape, if there is room
                side = round((height - 4) * rng.uniform(0.6, 1.0))
                top = y + (height - side) // 2
                if x + side > canvas.width - 4 or top + side > canvas.height - 1:
                    x += height
                    continue
                colour = rng.choice([name for name in COLOURS if is_visible(name, paper)])
                canvas.shape(rng.choice(context.shapes), colour, paint(rng, colour), (x, top, x + side, top + side))
                x += side + rng.randint(3, 12)
                continue
            text = _text(context)
            if x + face.width(text) > canvas.width - 6:
                # Do not cut words: a part of a word could be a word of the other split.
                text = "".join(rng.choices("0123456789" if context.simple else CHARACTERS, k=len(text)))
            while text and x + face.width(text) > canvas.width - 6:
                text = text[:-1].rstrip(" ")
            if not text:
                break
            if rng.random() < 0.15:
                ink = rng.choice(INKS) if contrasting(paper) == BLACK else rng.choice(PAPERS)
            canvas.text(text, x, y + height / 2, face, ink)
            x += round(face.width(text) + size * rng.uniform(0.25, 1.0))
        y += height
    return Drawing(canvas, "sheet", [], (), fonts=tuple(sorted(used)))


def _text(context: Context) -> str:
    """Return a word in any case, an invented word, a number, a code, or a run of arbitrary characters."""
    rng = context.rng
    chance = rng.random()
    if context.simple:
        word = rng.choice((*map(context.cased, (*SIMPLE_ITEMS, "total")), *MONTHS, *DAYS))
        return word if chance < 0.5 else rng.choice((money(cents(rng, 450)), str(rng.randint(0, 99))))
    if chance < 0.4:
        word = context.word(rng.choice(_ROLES))
        return rng.choice((word, word, word.upper(), word.title()))
    if chance < 0.6:
        texts = (money(cents(rng)), date(rng), code(rng), str(rng.randint(0, 9999)), f"{rng.randint(0, 100)}%")
        return rng.choice(texts)
    if chance < 0.7:
        return rng.choice(CHARACTERS)
    return "".join(rng.choices(CHARACTERS, k=rng.randint(2, 9)))
