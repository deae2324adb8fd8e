"""Receipts with questions about their content; in the simple world, receipts of three lines."""

from dataclasses import dataclass

from convllava.synthetic.canvas import Canvas, Colour, Region
from convllava.synthetic.fonts import Font
from convllava.synthetic.questions import ORDINALS, TOTALS, Draft, ask
from convllava.synthetic.style import DESKS, INKS, PAPERS, Context, Drawing, jitter
from convllava.synthetic.words import cents, date, money

_HEIGHTS = {"plain": 1.0, "shop": 1.5, "bold": 1.1, "large": 1.5, "rule": 0.5}
"""Height of each style of row, as a multiple of a plain row."""


@dataclass(frozen=True)
class Row:
    """A printed row: `label` at the left (or in the middle, if `centred`), `value` at the right."""

    label: str
    value: str = ""
    style: str = "plain"
    centred: bool = False


def draw_receipt(context: Context) -> Drawing:
    """Draw a narrow till receipt: shop, date, two to five items, total."""
    layout = paper, header, rule, order, total_style, quantity = context.layout("receipt")
    rng = context.rng
    white, desk = jitter(rng, rng.choice(PAPERS[:4]), 5), jitter(rng, rng.choice(DESKS), 20)
    canvas = Canvas(*context.extent(1.3, 2.9), white if paper == "full" else desk)
    inset = 0 if paper == "full" else context.pixels(rng.randint(5, 14))
    if inset:
        canvas.draw.rectangle((inset, inset, canvas.width - inset - 1, canvas.height - inset - 1), fill=white)
    edge, ink = inset + context.pixels(rng.randint(8, 14)), rng.choice(INKS)

    names = context.words(rng.randint(2, 5), "item")
    labels = [f"{rng.randint(1, 9)} x {name}" if quantity == "before" else name for name in names]
    amounts = [cents(rng) for _ in names]
    total = sum(amounts)
    extra = rng.choice((("Cash", -(-total // 500) * 500), ("Card", total), ("Tax", total // 5), ("VAT", total // 10)))
    shop = " ".join(context.words(rng.randint(1, 2), rng.choice(("shop", "surname", "noun")), longest=7))
    day = date(rng)
    number = str(rng.randint(100, 99999)) if rng.random() < 0.4 else ""
    total_label, sign = rng.choice(TOTALS), rng.choice(("", "", "$"))
    extras = [extra] if rng.random() < 0.35 else []

    is_centred = header == "centre"
    is_labelled = rng.random() < 0.4
    day_row = Row(rng.choice(("Date", "Date:")), day) if is_labelled else Row(day, centred=is_centred)
    currency = "$" if rng.random() < 0.15 else ""
    rows = [Row(shop, style="shop", centred=is_centred)]
    rows += [day_row] if order == "above" else []
    rows += [Row(rng.choice(("No.", "Receipt")), number)] if number else []
    rows += [Row(rule, style="rule")]
    rows += [Row(label, currency + money(amount)) for label, amount in zip(labels, amounts, strict=True)]
    rows += [Row(rule, style="rule"), Row(total_label, sign + money(total), total_style)]
    rows += [Row(label, money(amount)) for label, amount in extras]
    rows += [day_row] if order == "below" else []
    regions = _print(canvas, context, rows, edge, ink)

    printed = next(region for row, region in zip(rows, regions, strict=True) if row.style == total_style)
    region = Region(printed.box, printed.start + len(sign), printed.stop)
    drafts = [ask(rng, "field.price", money(price), item=name) for name, price in zip(names, amounts, strict=True)]
    drafts += [
        ask(rng, "field.total", money(total)),
        ask(rng, "field.shop", shop),
        ask(rng, "field.date", day),
        ask(rng, "ground.thing", region, thing="total"),
    ]
    drafts += [ask(rng, "field.number", number)] if number else []
    drafts += [ask(rng, "field.extra", money(amount), label=label) for label, amount in extras]

    parts = [f"receipt: {shop}", f"date {day}", *([f"no. {number}"] if number else [])]
    priced = [*zip(labels, amounts, strict=True), ("total", total), *extras]
    parts += [f"{label} {money(amount)}" for label, amount in priced]
    return Drawing(canvas, ". ".join(parts) + ".", drafts, layout)


def _print(canvas: Canvas, context: Context, rows: list[Row], edge: int, ink: Colour) -> list[Region]:
    """Print the rows so that they fit the paper. Return the region of each row's value, or of its label if it has no
    value."""
    left, right, room = edge, canvas.width - edge, canvas.height - 2 * edge
    share = sum(_HEIGHTS[row.style] for row in rows)
    most = min(30.0, room / share / 1.3 * 384 / context.size) * context.rng.uniform(0.8, 1.0)
    # For each style the largest face, up to a multiple of `most`, in which all its rows fit.
    faces: dict[str, Font] = {"rule": context.regular(most)}
    for style, factor in (("plain", 1.0), ("shop", 1.4), ("bold", 1.0), ("large", 1.4)):
        for row in rows:
            if row.style == style:
                text = f"{row.label}{'   ' if row.value else ''}{row.value}"
                face = context.fit(text, right - left, most * factor, bold=style != "plain")
                faces[style] = min(faces.get(style, face), face, key=lambda one: one.size)
    step = min(room / share, faces["plain"].size * context.rng.uniform(1.35, 2.3))
    top = edge + context.rng.uniform(0, 1) ** 2 * (room - step * share)
    regions: list[Region] = []
    for row in rows:
        y, top = top + step * _HEIGHTS[row.style] / 2, top + step * _HEIGHTS[row.style]
        if row.style == "rule":
            _rule(canvas, row.label, (left, right), round(y), ink)
            regions.append(Region((left, y, right, y)))
            continue
        x, anchor = ((left + right) / 2, "m") if row.centred else (left, "l")
        region = canvas.text(row.label, x, y, faces[row.style], ink, anchor)
        if row.value:
            region = canvas.text(row.value, right, y, faces[row.style], ink, "r")
        regions.append(region)
    return regions


def _rule(canvas: Canvas, style: str, sides: tuple[float, float], y: int, ink: Colour) -> None:
    """Draw a horizontal line in the style "none", "solid" or "dashed"."""
    left, right = round(sides[0]), round(sides[1])
    if style == "solid":
        canvas.draw.line((left, y, right, y), fill=ink, width=2)
    elif style == "dashed":
        for x in range(left, right - 4, 9):
            canvas.draw.line((x, y, x + 4, y), fill=ink, width=2)


def draw_ticket(context: Context) -> Drawing:
    """Draw the receipt of the simple world: three large lines with two items and their total."""
    layout = align, gap, rule = context.layout("ticket")
    rng = context.rng
    paper, ink = context.colours()
    canvas = Canvas(*context.extent(0.8, 1.25), paper)
    amounts = [cents(rng, 450) for _ in range(2)]
    labels = [*context.words(2, "item"), context.cased("total")]
    prices = [money(amount) for amount in [*amounts, sum(amounts)]]

    edge = context.pixels({"narrow": 22, "even": 34, "wide": 46}[gap])
    step = (canvas.height - edge) / 3
    most = min(56.0, 0.6 * step * 384 / context.size)
    fits = [context.fit(f"{a} {b} ", canvas.width - 2 * edge, most, True) for a, b in zip(labels, prices, strict=True)]
    face = min(fits, key=lambda one: one.size)
    _rule(canvas, rule, (edge, canvas.width - edge), round(edge / 2 + 2 * step), ink)
    regions: list[Region] = []  # of the prices
    for row, (label, price) in enumerate(zip(labels, prices, strict=True)):
        y = edge / 2 + step * (row + 0.5)
        canvas.number(canvas.text(label, edge, y, face, ink), row=row + 1, place=1)
        x = canvas.width - edge if align == "spread" else edge + face.width(f"{label} {price}")
        regions.append(canvas.text(price, x, y, face, ink, "r"))
        canvas.number(regions[-1], row=row + 1, place=2)

    lines = [f"{label} {price}" for label, price in zip(labels, prices, strict=True)]
    drafts: list[Draft] = [
        ask(rng, "field.price", price, item=label) for label, price in zip(labels[:2], prices, strict=False)
    ]
    drafts += [ask(rng, "field.total", prices[2]), ask(rng, "ground.thing", regions[2], thing="total")]
    for row, line in enumerate(lines):
        place = {"number": str(row + 1), "ordinal": ORDINALS[row]}
        drafts.append(ask(rng, "read.line", line, **place))
        drafts.append(ask(rng, "read.line_word", labels[row], which="first", **place))
    return Drawing(canvas, f"ticket: {'. '.join(lines)}.", drafts, layout)
