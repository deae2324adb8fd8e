"""Forms and tables: labelled fields and cells, with questions about their content."""

import random

from convllava.synthetic.canvas import Canvas, Colour, PageFullError, Region
from convllava.synthetic.questions import FORM_TITLES, ORDINALS, SIZES, STATUSES, TABLE_TITLES, ask, count
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
    fields = [(name, value) for name, value in values.items() if name in chosen]

    face = context.regular(rng.uniform(17, 27))
    small = context.bold(face.size * 384 / context.size * 0.9)
    room = min((canvas.height - edge - top) / len(fields), face.size * rng.uniform(3.0, 5.0))
    if room < face.size * (1.35 if labels == "left" else 2.5):
        raise PageFullError
    regions = []
    for row, (name, value) in enumerate(fields):
        label = name + (":" if colon == "colon" else "")
        y0, y1, right = top + row * room, top + (row + 1) * room, canvas.width - edge
        if labels == "left":
            x, y = edge + small.width("Amount: "), (y0 + y1) / 2
            canvas.text(label, edge, y, small, ink)
        else:
            x, y = edge + (context.pixels(10) if labels == "boxed" else 0), (y0 + small.size * 1.3 + y1) / 2
            canvas.text(label, x, y0 + small.size * 0.85 + 2, small, ink)
        if x + face.width(value) > right:
            raise PageFullError
        if labels == "boxed":
            canvas.draw.rectangle((edge, y0 + 2, right, y1 - 3), outline=ink)
        elif line == "underline":
            under = round(y + face.size * 0.65)
            canvas.draw.line((x, under, right, under), fill=blend(ink, canvas.background, 0.4))
        regions.append(canvas.text(value, x, y, face, ink))

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

    # Cells that fit the page, and faces of a random size, or smaller if necessary.
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
    edges = [edge + sum(needs[:number]) + extra * number for number in range(len(needs) + 1)]
    top += rng.uniform(0, canvas.height - edge - top - height * len(rows))
    ys = [top + row * height for row in range(len(rows) + 1)]

    for row in range(2, len(rows), 2) if ruling == "striped" else ():
        canvas.draw.rectangle((edges[0], ys[row], edges[-1], ys[row + 1]), fill=blend(canvas.background, ink, 0.12))
    if header != "bold":
        fill = ink if header == "dark" else blend(canvas.background, ink, 0.2)
        canvas.draw.rectangle((edges[0], ys[0], edges[-1], ys[1]), fill=fill)
    for y in {"striped": [], "open": ys[1:2]}.get(ruling, ys):
        canvas.draw.line((edges[0], y, edges[-1], y), fill=ink)
    for x in edges if ruling == "grid" else ():
        canvas.draw.line((x, ys[0], x, ys[-1]), fill=ink)

    regions: list[Region] = []  # of the first cell of each row
    for number, cells in enumerate(rows):
        colour = contrasting(ink) if number == 0 and header == "dark" else ink
        own_face = bold if number == 0 else face
        for column, text in enumerate(cells):
            left, right, pad = edges[column], edges[column + 1], own_face.size * 0.4
            places = {"left": (left + pad, "l"), "centre": ((left + right) / 2, "m"), "right": (right - pad, "r")}
            x, anchor = places["left" if column == 0 else align]
            region = canvas.text(text, x, top + (number + 0.5) * height, own_face, colour, anchor)
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
