"""Pages of free text: signs and paragraphs, with questions about their text."""

import random

from convllava.synthetic.canvas import Canvas, Region
from convllava.synthetic.fonts import Font
from convllava.synthetic.questions import ORDINALS, Draft, ask, count
from convllava.synthetic.style import VIVID, WALLS, Context, Drawing, contrasting, jitter
from convllava.synthetic.words import code


def draw_sign(context: Context) -> Drawing:
    """Draw a coloured board with one to three lines of large text."""
    layout = board, align, tone, number = context.layout("sign")
    rng, rows = context.rng, int(number)
    canvas = Canvas(*context.extent(0.42 + 0.12 * rows, 0.8 + 0.2 * rows), jitter(rng, rng.choice(WALLS), 20))
    if tone == "vivid":
        paint = jitter(rng, rng.choice(VIVID))
        ink = contrasting(paint)
    else:
        paint, ink = context.colours(dark=1.0 if tone == "dark" else 0.0)
    gap, thick = context.pixels(rng.randint(6, 16)), context.pixels(rng.randint(2, 6))
    if board == "full":
        canvas.background = paint
        canvas.draw.rectangle((0, 0, canvas.width, canvas.height), fill=paint)
        edge = gap + thick
    else:
        radius, outline = context.pixels(24) if board == "round" else 0, ink if board != "double" else None
        frame = (gap, gap, canvas.width - gap - 1, canvas.height - gap - 1)
        canvas.draw.rounded_rectangle(frame, radius, paint, outline, thick)
        edge = gap + 3 * thick + context.pixels(6)
    if board == "double":
        inset = gap + 2 * thick
        inner = (inset, inset, canvas.width - inset - 1, canvas.height - inset - 1)
        canvas.draw.rectangle(inner, outline=ink, width=max(1, thick // 2))

    lines = [_sign_line(context) for _ in range(rows)]
    # All lines in one size, or each as large as it fits.
    step = (canvas.height - 2 * edge) / rows
    ideal = min(88.0, 0.75 * step * 384 / context.size) * rng.uniform(0.7, 1.0)
    faces = [context.fit(line, canvas.width - 2 * edge, ideal, bold=True) for line in lines]
    if rng.random() < 0.6:
        faces = [min(faces, key=lambda face: face.size)] * rows
    x, anchor = (edge, "l") if align == "left" else (canvas.width / 2, "m")
    step = min(step, max(face.size for face in faces) * rng.uniform(1.3, 2.2))
    top = (canvas.height - step * rows) / 2
    regions = [
        canvas.text(line, x, top + step * (row + 0.5), face, ink, anchor)
        for row, (line, face) in enumerate(zip(lines, faces, strict=True))
    ]
    canvas.number_words(lines, regions, through=True)

    words = " ".join(lines).split(" ")
    drafts = [ask(rng, "read.sign", " ".join(words))]
    if "&" not in words:  # it is not clear whether "&" counts as a word
        drafts += [ask(rng, "read.sign_word", word, ordinal=ORDINALS[place]) for place, word in enumerate(words)]
        drafts.append(ask(rng, "read.sign_word", words[-1], ordinal="last"))
        counted = [
            canvas.word(region, number, line)
            for line, region in zip(lines, regions, strict=True)
            for number in range(len(line.split(" ")))
        ]
        drafts.append(count(rng, "count.words", counted))
    if rows > 1:
        drafts += [
            ask(rng, "read.sign_line", line, number=str(row), ordinal=ORDINALS[row - 1])
            for row, line in enumerate(lines, start=1)
        ]
    drafts += _word_drafts(canvas, rng, lines, regions)
    return Drawing(canvas, f"sign: {' '.join(lines)}.", drafts, layout)


def _sign_line(context: Context) -> str:
    """Return one to three words, sometimes with a number, a code or a symbol."""
    rng = context.rng
    roles = ("adjective", "noun", "noun", "surname")
    words = [context.word(rng.choice(roles)) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    words = [context.cased(word) for word in words]
    chance = rng.random()
    if chance < 0.08 and len(words) > 1:
        words.insert(1, "&")
    elif chance < 0.13:
        words[0] += "'s"
    elif chance < 0.25:
        number = rng.randint(1, 999)
        numbers = (str(number), f"{number % 90 + 10}%", f"${number}", f"#{number}", f"+{number}", code(rng))
        words[-1] = rng.choice(numbers)
    return " ".join(words)


def _word_drafts(
    canvas: Canvas, rng: random.Random, lines: list[str], regions: list[Region], heading: str = ""
) -> list[Draft]:
    """Ask for the box of each word that is printed only once on the page. Questions omit its punctuation."""
    printed = [_bare(word) for line in [heading, *lines] for word in line.split(" ")]
    return [
        ask(rng, "ground.word", canvas.word(region, number, line), word=_bare(word))
        for line, region in zip(lines, regions, strict=True)
        for number, word in enumerate(line.split(" "))
        if printed.count(_bare(word)) == 1 and len(word) > 1
    ]


def _bare(word: str) -> str:
    """Return `word` without the punctuation around it."""
    return word.strip(".,()")


def draw_paragraph(context: Context) -> Drawing:
    """Draw a block of three to seven short lines, sometimes below a title, sometimes with a number in it."""
    layout = align, title, aspect, leading = context.layout("paragraph")
    rng = context.rng
    paper, ink = context.colours()
    canvas = Canvas(*context.aspect(aspect), paper)
    edge = context.pixels(rng.randint(14, 30))
    x, anchor = {"left": (edge, "l"), "centre": (canvas.width / 2, "m"), "right": (canvas.width - edge, "r")}[align]
    heading, top = "", float(edge)
    if title != "none":
        roles = rng.choice((("noun",), ("adjective", "noun")))
        heading = " ".join(context.cased(context.word(role)) for role in roles)
        face = context.fit(heading, canvas.width - 2 * edge, 30 if title == "bold" else 44, bold=True)
        canvas.text(heading, x, edge + face.size / 2, face, ink, anchor)
        top = edge + face.size * 1.25 + context.pixels(rng.randint(6, 20))
    rows, loosest = rng.randint(3, 7), 1.45 if leading == "tight" else 2.2
    room = canvas.height - edge - top
    most = min(room / rows / (loosest - 0.15), canvas.width / 11) * 384 / context.size
    body = context.regular(min(rng.uniform(18, 36), most))
    step = min(room / rows, body.size * rng.uniform(loosest - 0.15, loosest))
    lines = _paragraph_lines(context, rows, canvas.width - 2 * edge, body)
    top += rng.uniform(0, 1) ** 2 * (room - step * rows)
    regions = [canvas.text(line, x, top + step * (row + 0.5), body, ink, anchor) for row, line in enumerate(lines)]
    canvas.number_words(lines, regions)
    caption = f"paragraph: {f'title {heading}. ' if heading else ''}{' / '.join(lines)}"

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
    drafts += _word_drafts(canvas, rng, lines, regions, heading)
    return Drawing(canvas, caption, drafts, layout)


def _paragraph_lines(context: Context, rows: int, room: float, body: Font) -> list[str]:
    """Return lines of up to five words and at most `room` pixels, sometimes with a number and punctuation."""
    rng = context.rng
    longest = rng.choice((2, 3, 3, 4, 4, 5))

    def word() -> str:
        return context.cased(context.word(rng.choice(("noun", "adjective", "noun", "item"))))

    lines: list[str] = []
    while len(lines) < rows:
        line = word()
        for _ in range(rng.randint(1, longest - 1)):
            wider = f"{line} {word()}"
            line = wider if body.width(wider) <= room else line
        lines.append(line)
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
