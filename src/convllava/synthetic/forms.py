"""Forms and tables: labelled fields and cells, with questions about their content."""

from __future__ import annotations

import random
from dataclasses import dataclass

from convllava.synthetic.canvas import Canvas, Colour, PageFullError, Region
from convllava.synthetic.fonts import Font
from convllava.synthetic.questions import FORM_TITLES, ORDINALS, SIZES, STATUSES, TABLE_TITLES, ask, count
from convllava.synthetic.sample import Box
from convllava.synthetic.style import Context, Drawing, blend, contrasting
from convllava.synthetic.words import cents, code, date, money

_RANGES = {"Qty": (1, 99), "Stock": (0, 500), "Year": (1950, 2029), "Score": (0, 100), "Age": (1, 99)}
_CELLS = ("Price", "Code", "Size", "Room", *_RANGES)


def draw_form(context: Context) -> Drawing:
    """Draw three to five labelled fields with their values."""
    layout = labels, title, colon, line = context.layout("form")
    rng = context.rng
    paper, ink = context.colours(dark=0.08)
    canvas = Canvas(*(context.extent(0.5, 1.2) if labels == "left" else context.extent(0.7, 1.5)), paper)
    edge = context.pixels(rng.randint(12, 22))
    heading = rng.choice(FORM_TITLES) if title != "none" else ""
    top = edge + _print_heading(canvas, context, heading, edge, title, ink)
    fields = _form_fields(context)
    face = context.regular(rng.uniform(17, 27))
    room = min((canvas.height - edge - top) / len(fields), face.size * rng.uniform(3.0, 5.0))
    regions = []
    for row, (name, value) in enumerate(fields):
        label = name + (":" if colon == "colon" else "")
        box = (edge, top + row * room, canvas.width - edge, top + (row + 1) * room)
        regions.append(_print_field(canvas, context, box, (label, value), (labels, line), (face, ink)))
    drafts = [ask(rng, "field.value", value, label=name.lower()) for name, value in fields]
    drafts += [
        ask(rng, "ground.thing", region, thing=name.lower()) for (name, _), region in zip(fields, regions, strict=True)
    ]
    drafts += [ask(rng, "read.title", heading)] if heading else []
    named = f"title {heading}. " if heading else ""
    return Drawing(canvas, f"form: {named}{'. '.join(f'{name} {value}' for name, value in fields)}.", drafts, layout)


def _print_heading(canvas: Canvas, context: Context, heading: str, edge: int, align: str, ink: Colour) -> float:
    """Print a title, if there is one. Return the height that it takes."""
    if not heading:
        return 0
    face = context.fit(heading, canvas.width - 2 * edge, 32, bold=True)
    x, anchor = (canvas.width / 2, "m") if align == "centre" else (edge, "l")
    canvas.text(heading, x, edge + face.size / 2, face, ink, anchor)
    return face.size * 1.5


def _form_fields(context: Context) -> list[tuple[str, str]]:
    """Return three to five different field names with values, always in the same order."""
    rng = context.rng
    digits = rng.choice(("555-####", "(0##) ####", "+## ### ###", "0## ######"))
    name = f"{context.word('name', 7)} {context.word('surname', 8)}"
    values = {
        "Name": context.cased(name if rng.random() < 0.7 else name.split(" ")[0]),
        "Date": date(rng),
        "City": context.cased(context.word("city")),
        "Phone": "".join(rng.choice("0123456789") if char == "#" else char for char in digits),
        "Code": code(rng),
        "Amount": money(cents(rng, 99999)),
        "Age": str(rng.randint(1, 99)),
        "Order": str(rng.randint(100, 99999)),
        "Room": str(rng.randint(1, 999)),
        "Score": f"{rng.randint(1, 100)}%",
        "Status": rng.choice(STATUSES),
    }
    chosen = set(rng.sample(list(values), rng.randint(3, 5)))
    return [(label, value) for label, value in values.items() if label in chosen]


def _print_field(
    canvas: Canvas,
    context: Context,
    box: Box,
    texts: tuple[str, str],
    style: tuple[str, str],
    look: tuple[Font, Colour],
) -> Region:
    """Print one field into `box` and return the region of its value."""
    (label, value), (labels, line), (face, ink) = texts, style, look
    x0, y0, x1, y1 = box
    small = context.bold(face.size * 384 / context.size * 0.9)
    if y1 - y0 < face.size * (1.35 if labels == "left" else 2.5):
        raise PageFullError
    if labels == "left":
        x, y = x0 + small.width("Amount: "), (y0 + y1) / 2
        canvas.text(label, x0, y, small, ink)
    else:
        x, y = x0 + (context.pixels(10) if labels == "boxed" else 0), (y0 + small.size * 1.3 + y1) / 2
        canvas.text(label, x, y0 + small.size * 0.85 + 2, small, ink)
    if x + face.width(value) > x1:
        raise PageFullError
    if labels == "boxed":
        canvas.draw.rectangle((x0, y0 + 2, x1, y1 - 3), outline=ink)
    elif line == "underline":
        under = round(y + face.size * 0.65)
        canvas.draw.line((x, under, x1, under), fill=blend(ink, canvas.background, 0.4))
    return canvas.text(value, x, y, face, ink)


@dataclass(frozen=True)
class Grid:
    """The cells of a table: the edges of its columns, and `rows` rows of equal height from `top` down."""

    columns: list[float]
    top: float
    height: float
    rows: int

    def y(self, row: float) -> float:
        """Return the upper edge of a row; with a fraction, a height inside the row."""
        return self.top + row * self.height


def draw_table(context: Context) -> Drawing:
    """Draw a header and two to five rows of two to four columns. The first column names the row."""
    layout = ruling, header, align, title = context.layout("table")
    rng = context.rng
    paper, ink = context.colours(dark=0.08)
    canvas = Canvas(*context.extent(0.45, 1.1), paper)
    edge = context.pixels(rng.randint(10, 20))
    heading = rng.choice(TABLE_TITLES) if title == "top" else ""
    top = edge + _print_heading(canvas, context, heading, edge, "left", ink)
    first, role = rng.choice((("Item", "item"), ("Name", "name"), ("City", "city"), ("Item", "noun")))
    chosen = rng.sample(_CELLS, rng.randint(1, 3))
    body = [[name, *(_cell(rng, column) for column in chosen)] for name in context.words(rng.randint(2, 5), role)]
    rows = [[first, *chosen], *body]
    grid, faces = _fit_table(canvas, context, rows, edge, top)
    _rule_table(canvas, grid, ruling, header, ink)

    regions: list[Region] = []  # of the first cell of each row
    for number, row in enumerate(rows):
        face = faces[1] if number == 0 else faces[0]
        colour = contrasting(ink) if number == 0 and header == "dark" else ink
        for column, text in enumerate(row):
            left, right, pad = grid.columns[column], grid.columns[column + 1], face.size * 0.4
            places = {"left": (left + pad, "l"), "centre": ((left + right) / 2, "m"), "right": (right - pad, "r")}
            x, anchor = places["left" if column == 0 else align]
            region = canvas.text(text, x, grid.y(number + 0.5), face, colour, anchor)
            canvas.number(region, row=number, place=column + 1)
            if column == 0:
                regions.append(region)

    drafts = [
        ask(rng, "table.cell", text, column=column.lower(), row=row[0])
        for row in body
        for column, text in zip(chosen, row[1:], strict=True)
    ]
    place = rng.randrange(len(rows[0]))
    drafts.append(ask(rng, "table.header", rows[0][place], ordinal=ORDINALS[place], number=str(place + 1)))
    place = rng.randrange(len(body))
    drafts.append(ask(rng, "table.first", body[place][0], ordinal=ORDINALS[place], number=str(place + 1)))
    drafts.append(count(rng, "count.rows", regions[1:]))
    drafts += [ask(rng, "read.title", heading)] if heading else []
    named = f"title {heading}. " if heading else ""
    return Drawing(canvas, f"table: {named}{'; '.join(', '.join(row) for row in rows)}.", drafts, layout)


def _cell(rng: random.Random, column: str) -> str:
    """Return a random value for a column."""
    if column == "Price":
        return money(cents(rng))
    if column == "Code":
        return code(rng)
    if column == "Size":
        return rng.choice(SIZES)
    if column == "Room":
        return f"{rng.choice('ABC')}{rng.randint(1, 99)}"
    return str(rng.randint(*_RANGES[column]))


def _fit_table(
    canvas: Canvas, context: Context, rows: list[list[str]], edge: int, top: float
) -> tuple[Grid, tuple[Font, Font]]:
    """Choose a random text size, or a smaller one if the table does not fit. Return the cells and the regular and bold
    faces."""
    rng = context.rng
    size = min(rng.uniform(17, 34), (canvas.height - edge - top) / len(rows) / 1.5 * 384 / context.size)
    while True:
        face, bold = context.regular(size), context.bold(size)
        needs = [
            max(bold.width(column[0] + "  "), *map(face.width, column)) + face.size
            for column in zip(*rows, strict=True)
        ]
        spare = canvas.width - 2 * edge - sum(needs)
        height = min((canvas.height - edge - top) / len(rows), face.size * rng.uniform(1.6, 2.8))
        if spare >= 0 and height >= face.size * 1.3:
            break
        if face.size == 15:
            raise PageFullError
        size = (face.size - 1) * 384 / context.size
    extra = min(spare / len(needs), face.size * 4)
    columns = [edge + sum(needs[:number]) + extra * number for number in range(len(needs) + 1)]
    free = canvas.height - edge - top - height * len(rows)
    return Grid(columns, top + rng.uniform(0, free), height, len(rows)), (face, bold)


def _rule_table(canvas: Canvas, grid: Grid, ruling: str, header: str, ink: Colour) -> None:
    left, right = grid.columns[0], grid.columns[-1]
    for row in range(2, grid.rows, 2) if ruling == "striped" else ():
        canvas.draw.rectangle((left, grid.y(row), right, grid.y(row + 1)), fill=blend(canvas.background, ink, 0.12))
    if header != "bold":
        fill = ink if header == "dark" else blend(canvas.background, ink, 0.2)
        canvas.draw.rectangle((left, grid.y(0), right, grid.y(1)), fill=fill)
    lines = {"striped": range(0), "open": range(1, 2)}.get(ruling, range(grid.rows + 1))
    for row in lines:
        canvas.draw.line((left, grid.y(row), right, grid.y(row)), fill=ink)
    for x in grid.columns if ruling == "grid" else ():
        canvas.draw.line((x, grid.y(0), x, grid.y(grid.rows)), fill=ink)
