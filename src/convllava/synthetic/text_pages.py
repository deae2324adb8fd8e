"""Pages of free text: signs and paragraphs, with questions that have them read."""

from __future__ import annotations

import random

from convllava.synthetic.canvas import Canvas, Region
from convllava.synthetic.fonts import Font
from convllava.synthetic.palette import VIVID, WALLS, Colour, contrasting, jitter
from convllava.synthetic.questions import ORDINALS, Draft, ask, count
from convllava.synthetic.style import Context, Drawing
from convllava.synthetic.words import code


def draw_sign(context: Context) -> Drawing:
    """A coloured board with one to three lines of large text."""
    layout = board, align, tone, count = context.layout("sign")
    rng = context.rng
    canvas = Canvas(
        *context.extent(0.42 + 0.12 * int(count), 0.8 + 0.2 * int(count)), jitter(rng, rng.choice(WALLS), 20)
    )
    paint, ink = _sign_colours(context, tone)
    edge = _paint_board(canvas, context, board, paint, ink)
    lines = [_sign_line(context) for _ in range(int(count))]
    regions = _print_sign(canvas, context, [" ".join(line) for line in lines], edge, align, ink)
    canvas.number_words([" ".join(line) for line in lines], regions, through=True)
    caption = f"sign: {' '.join(word for line in lines for word in line)}."
    return Drawing(canvas, caption, _sign_drafts(canvas, rng, lines, regions), layout)


def _sign_colours(context: Context, tone: str) -> tuple[Colour, Colour]:
    if tone == "vivid":
        paint = jitter(context.rng, context.rng.choice(VIVID))
        return paint, contrasting(paint)
    return context.colours(dark=1.0 if tone == "dark" else 0.0)


def _sign_line(context: Context) -> list[str]:
    """One to three words, at times with a number, a code or a mark between them."""
    rng = context.rng
    words = [
        context.word(rng.choice(("adjective", "noun", "noun", "surname"))) for _ in range(rng.choice((1, 1, 2, 2, 3)))
    ]
    words = [context.cased(word) for word in words]
    chance = rng.random()
    if chance < 0.08 and len(words) > 1:
        words.insert(1, "&")
    elif chance < 0.13:
        words[0] += "'s"
    elif chance < 0.25:
        number = rng.randint(1, 999)
        words[-1] = rng.choice(
            (str(number), f"{number % 90 + 10}%", f"${number}", f"#{number}", f"+{number}", code(rng))
        )
    return words


def _paint_board(canvas: Canvas, context: Context, board: str, paint: Colour, ink: Colour) -> int:
    """Paint the board and return how far text must stay from the picture's edge."""
    gap, thick = context.pixels(context.rng.randint(6, 16)), context.pixels(context.rng.randint(2, 6))
    frame = (gap, gap, canvas.width - gap - 1, canvas.height - gap - 1)
    if board == "full":
        canvas.background = paint
        canvas.draw.rectangle((0, 0, canvas.width, canvas.height), fill=paint)
        return gap + thick
    radius = context.pixels(24) if board == "round" else 0
    canvas.draw.rounded_rectangle(frame, radius, paint, ink if board != "double" else None, thick)
    if board == "double":
        inner = (frame[0] + 2 * thick, frame[1] + 2 * thick, frame[2] - 2 * thick, frame[3] - 2 * thick)
        canvas.draw.rectangle(inner, outline=ink, width=max(1, thick // 2))
    return gap + 3 * thick + context.pixels(6)


def _print_sign(canvas: Canvas, context: Context, lines: list[str], edge: int, align: str, ink: Colour) -> list[Region]:
    room = canvas.width - 2 * edge
    step = (canvas.height - 2 * edge) / len(lines)
    ideal = min(88.0, 0.75 * step * 384 / context.size) * context.rng.uniform(0.7, 1.0)
    faces = [context.fit(line, room, ideal, bold=True) for line in lines]
    if context.rng.random() < 0.6:
        faces = [min(faces, key=lambda face: face.size)] * len(lines)
    x, anchor = (edge, "l") if align == "left" else (canvas.width / 2, "m")
    step = min(step, max(face.size for face in faces) * context.rng.uniform(1.3, 2.2))
    top = (canvas.height - step * len(lines)) / 2
    return [
        canvas.text(line, x, top + step * (row + 0.5), face, ink, anchor)
        for row, (line, face) in enumerate(zip(lines, faces, strict=True))
    ]


def _sign_drafts(canvas: Canvas, rng: random.Random, lines: list[list[str]], regions: list[Region]) -> list[Draft]:
    words = [word for line in lines for word in line]
    drafts = [ask(rng, "read.sign", " ".join(words))]
    # Whether "&" counts as a word is anyone's guess.
    if "&" not in words:
        drafts += [ask(rng, "read.sign_word", word, ordinal=ORDINALS[place]) for place, word in enumerate(words)]
        drafts += [
            ask(rng, "read.sign_word", words[-1], ordinal="last"),
            count(rng, "count.words", _words_of(canvas, lines, regions)),
        ]
    if len(lines) > 1:
        for row, line in enumerate(lines):
            drafts.append(ask(rng, "read.sign_line", " ".join(line), number=str(row + 1), ordinal=ORDINALS[row]))
    return drafts + word_drafts(canvas, rng, [" ".join(line) for line in lines], regions)


def _words_of(canvas: Canvas, lines: list[list[str]], regions: list[Region]) -> list[Region]:
    return [
        canvas.word(region, number, " ".join(line))
        for line, region in zip(lines, regions, strict=True)
        for number in range(len(line))
    ]


def word_drafts(
    canvas: Canvas, rng: random.Random, lines: list[str], regions: list[Region], heading: str = ""
) -> list[Draft]:
    """Where each word stands that is printed only once on the page; questions leave its marks off."""
    printed = [_bare(word) for line in [heading, *lines] for word in line.split(" ")]
    return [
        ask(rng, "ground.word", canvas.word(region, number, line), word=_bare(word))
        for line, region in zip(lines, regions, strict=True)
        for number, word in enumerate(line.split(" "))
        if printed.count(_bare(word)) == 1 and len(word) > 1
    ]


def _bare(word: str) -> str:
    """`word` without the marks around it."""
    return word.strip(".,()")


def draw_paragraph(context: Context) -> Drawing:
    """A block of three to seven short lines, at times below a title, at times with a number in it."""
    layout = align, title, aspect, leading = context.layout("paragraph")
    rng = context.rng
    paper, ink = context.colours()
    canvas = Canvas(*context.aspect(aspect), paper)
    edge = context.pixels(rng.randint(14, 30))
    heading = _heading(context) if title != "none" else ""
    top = _print_heading(canvas, context, heading, title, edge, align, ink)
    count, loosest = rng.randint(3, 7), 1.45 if leading == "tight" else 2.2
    room = canvas.height - edge - top
    most = min(room / count / (loosest - 0.15), canvas.width / 11) * 384 / context.size
    body = context.regular(min(rng.uniform(18, 36), most))
    step = min(room / count, body.size * rng.uniform(loosest - 0.15, loosest))
    lines = _paragraph_lines(context, count, canvas.width - 2 * edge, body)
    x, anchor = _start(canvas, edge, align)
    top += rng.uniform(0, 1) ** 2 * (room - step * count)
    regions = [canvas.text(line, x, top + step * (row + 0.5), body, ink, anchor) for row, line in enumerate(lines)]
    name = f"title {heading}. " if heading else ""
    canvas.number_words(lines, regions)
    caption = f"paragraph: {name}{' / '.join(lines)}"
    return Drawing(canvas, caption, _paragraph_drafts(canvas, rng, heading, lines, regions), layout)


def _heading(context: Context) -> str:
    return " ".join(
        context.cased(context.word(role)) for role in context.rng.choice((("noun",), ("adjective", "noun")))
    )


def _paragraph_lines(context: Context, count: int, room: float, body: Font) -> list[str]:
    """Lines that fill `room` pixels at most, of two to five words each where they fit."""
    rng = context.rng
    longest = rng.choice((2, 3, 3, 4, 4, 5))
    lines: list[str] = []
    while len(lines) < count:
        line = context.cased(_prose_word(context))
        for _ in range(rng.randint(1, longest - 1)):
            wider = f"{line} {context.cased(_prose_word(context))}"
            line = wider if body.width(wider) <= room else line
        lines.append(line)
    return _punctuated(rng, lines, room, body)


def _prose_word(context: Context) -> str:
    return context.word(context.rng.choice(("noun", "adjective", "noun", "item")))


def _punctuated(rng: random.Random, lines: list[str], room: float, body: Font) -> list[str]:
    """At times a number instead of one word, a comma, a full stop."""
    if rng.random() < 0.45:
        row = rng.randrange(len(lines))
        words = lines[row].split(" ")
        words[rng.randrange(len(words))] = str(rng.choice((rng.randint(2, 99), rng.randint(100, 9999))))
        lines[row] = " ".join(words)
    if rng.random() < 0.4:
        row = rng.randrange(len(lines) - 1)
        lines[row] += ","
        lines[-1] += "."
    if rng.random() < 0.1:
        lines[0] = f"({lines[0]})"
    return [line if body.width(line) <= room else line.rstrip(".,") for line in lines]


def _print_heading(
    canvas: Canvas, context: Context, heading: str, style: str, edge: int, align: str, ink: Colour
) -> float:
    """Print the title, if any, and return where the body may start."""
    if not heading:
        return edge
    face = context.fit(heading, canvas.width - 2 * edge, 30 if style == "bold" else 44, bold=True)
    x, anchor = _start(canvas, edge, align)
    canvas.text(heading, x, edge + face.size / 2, face, ink, anchor)
    return edge + face.size * 1.25 + context.pixels(context.rng.randint(6, 20))


def _start(canvas: Canvas, edge: float, align: str) -> tuple[float, str]:
    places = {"left": (edge, "l"), "centre": (canvas.width / 2, "m"), "right": (canvas.width - edge, "r")}
    return places[align]


def _paragraph_drafts(
    canvas: Canvas, rng: random.Random, heading: str, lines: list[str], regions: list[Region]
) -> list[Draft]:
    drafts = [ask(rng, "read.title", heading)] if heading else [count(rng, "count.lines", regions)]
    for row, line in enumerate(lines):
        words = [_bare(word) for word in line.split(" ")]
        place = {"number": str(row + 1), "ordinal": ORDINALS[row]}
        drafts.append(ask(rng, "read.line_word", words[0], which="first", **place))
        drafts.append(ask(rng, "read.line_word", words[-1], which="last", **place))
        if len(words) > 2:
            drafts.append(ask(rng, "read.line_word", words[1], which="second", **place))
        drafts.append(ask(rng, "read.line", line, **place))
    numbers = [_bare(word) for line in lines for word in line.split(" ") if any(map(str.isdigit, word))]
    if len(numbers) == 1:
        drafts += [ask(rng, "read.number", numbers[0])] * 3
    return drafts + word_drafts(canvas, rng, lines, regions, heading)
