"""Receipts, and the three-line tickets of the simple world, with questions about what they state."""

from __future__ import annotations

from dataclasses import dataclass

from convllava.synthetic.canvas import Canvas, Region
from convllava.synthetic.fonts import Font
from convllava.synthetic.palette import DESKS, INKS, PAPERS, Colour, jitter
from convllava.synthetic.questions import ORDINALS, TOTALS, Draft, ask
from convllava.synthetic.style import Context, Drawing
from convllava.synthetic.words import cents, date, money

_HEIGHTS = {"plain": 1.0, "shop": 1.5, "bold": 1.1, "large": 1.5, "rule": 0.5}


@dataclass(frozen=True)
class Bill:
    """What a receipt states: items as printed label, item and cents; `number` and `extra` may be missing."""

    shop: str
    date: str
    number: str
    items: list[tuple[str, str, int]]
    label: str
    sign: str
    extra: tuple[str, int] | None

    @property
    def total(self) -> int:
        """The sum of the items in cents."""
        return sum(amount for _, _, amount in self.items)

    def caption(self) -> str:
        """The transcription of the receipt."""
        parts = [f"receipt: {self.shop}", f"date {self.date}"]
        parts += [f"no. {self.number}"] if self.number else []
        parts += [f"{label} {money(amount)}" for label, _, amount in self.items]
        parts += [f"total {money(self.total)}"]
        parts += [f"{self.extra[0]} {money(self.extra[1])}"] if self.extra else []
        return ". ".join(parts) + "."


@dataclass(frozen=True)
class Row:
    """A row to print: `label` at the left (or in the middle, if `centred`), `value` at the right."""

    label: str
    value: str = ""
    style: str = "plain"
    centred: bool = False


def draw_receipt(context: Context) -> Drawing:
    """A narrow till receipt: shop, date, two to five items, total."""
    layout = paper, header, rule, order, total, quantity = context.layout("receipt")
    canvas, edge, ink = _paper(context, paper)
    bill = _bill(context, quantity)
    rows = _rows(context, bill, header == "centre", rule, order, total)
    regions = _print(canvas, context, rows, edge, ink)
    printed = next(region for row, region in zip(rows, regions, strict=True) if row.style == total)
    amount = Region(printed.box, printed.start + len(bill.sign), printed.stop)
    return Drawing(canvas, bill.caption(), _drafts(context, bill, amount), layout)


def _paper(context: Context, paper: str) -> tuple[Canvas, int, Colour]:
    """The picture, how far text must stay from its sides, and the ink."""
    rng = context.rng
    white, desk = jitter(rng, rng.choice(PAPERS[:4]), 5), jitter(rng, rng.choice(DESKS), 20)
    canvas = Canvas(*context.extent(1.3, 2.9), white if paper == "full" else desk)
    inset = 0 if paper == "full" else context.pixels(rng.randint(5, 14))
    if inset:
        canvas.draw.rectangle((inset, inset, canvas.width - inset - 1, canvas.height - inset - 1), fill=white)
    return canvas, inset + context.pixels(rng.randint(8, 14)), rng.choice(INKS)


def _bill(context: Context, quantity: str) -> Bill:
    rng = context.rng
    names = context.words(rng.randint(2, 5), "item")
    labels = [f"{rng.randint(1, 9)} x {name}" if quantity == "before" else name for name in names]
    items = [(label, name, cents(rng)) for label, name in zip(labels, names, strict=True)]
    total = sum(amount for _, _, amount in items)
    extra = rng.choice((("Cash", -(-total // 500) * 500), ("Card", total), ("Tax", total // 5), ("VAT", total // 10)))
    return Bill(
        shop=" ".join(context.words(rng.randint(1, 2), rng.choice(("shop", "surname", "noun")), longest=7)),
        date=date(rng),
        number=str(rng.randint(100, 99999)) if rng.random() < 0.4 else "",
        items=items,
        label=rng.choice(TOTALS),
        sign=rng.choice(("", "", "$")),
        extra=extra if rng.random() < 0.35 else None,
    )


def _rows(context: Context, bill: Bill, centred: bool, rule: str, order: str, total: str) -> list[Row]:
    rng = context.rng
    labelled = rng.random() < 0.4
    day = Row(rng.choice(("Date", "Date:")), bill.date) if labelled else Row(bill.date, centred=centred)
    mark = "$" if rng.random() < 0.15 else ""
    rows = [Row(bill.shop, style="shop", centred=centred)]
    rows += [day] if order == "above" else []
    rows += [Row(rng.choice(("No.", "Receipt")), bill.number)] if bill.number else []
    rows += [Row(rule, style="rule")]
    rows += [Row(label, mark + money(amount)) for label, _, amount in bill.items]
    rows += [Row(rule, style="rule"), Row(bill.label, bill.sign + money(bill.total), total)]
    rows += [Row(bill.extra[0], money(bill.extra[1]))] if bill.extra else []
    return rows + ([day] if order == "below" else [])


def _print(canvas: Canvas, context: Context, rows: list[Row], edge: int, ink: Colour) -> list[Region]:
    """Print the rows in faces that suit the paper's width and height."""
    left, right, room = edge, canvas.width - edge, canvas.height - 2 * edge
    share = sum(_HEIGHTS[row.style] for row in rows)
    most = min(30.0, room / share / 1.3 * 384 / context.size) * context.rng.uniform(0.8, 1.0)
    faces = _faces(context, rows, right - left, most)
    step = min(room / share, faces["plain"].size * context.rng.uniform(1.35, 2.3))
    y = edge + context.rng.uniform(0, 1) ** 2 * (room - step * share)
    regions = []
    for row in rows:
        middle, y = y + step * _HEIGHTS[row.style] / 2, y + step * _HEIGHTS[row.style]
        regions.append(_print_row(canvas, row, (left, right), middle, faces[row.style], ink))
    return regions


def _faces(context: Context, rows: list[Row], room: float, most: float) -> dict[str, Font]:
    """For each style of row the largest face, `most` or a multiple of it, in which all its rows fit."""
    found: dict[str, Font] = {"rule": context.regular(most)}
    for style, factor in (("plain", 1.0), ("shop", 1.4), ("bold", 1.0), ("large", 1.4)):
        texts = [f"{row.label}{'   ' if row.value else ''}{row.value}" for row in rows if row.style == style]
        for text in texts:
            face = context.fit(text, room, most * factor, bold=style != "plain")
            found[style] = min(found.get(style, face), face, key=lambda one: one.size)
    return found


def _print_row(canvas: Canvas, row: Row, sides: tuple[float, float], y: float, face: Font, ink: Colour) -> Region:
    """Print one row and return the region of its value, or of its label if it has none."""
    left, right = sides
    if row.style == "rule":
        _rule(canvas, row.label, sides, round(y), ink)
        return Region((left, y, right, y))
    x, anchor = ((left + right) / 2, "m") if row.centred else (left, "l")
    label = canvas.text(row.label, x, y, face, ink, anchor)
    return canvas.text(row.value, right, y, face, ink, "r") if row.value else label


def _rule(canvas: Canvas, style: str, sides: tuple[float, float], y: int, ink: Colour) -> None:
    left, right = round(sides[0]), round(sides[1])
    if style == "solid":
        canvas.draw.line((left, y, right, y), fill=ink, width=2)
    elif style == "dashed":
        for x in range(left, right - 4, 9):
            canvas.draw.line((x, y, x + 4, y), fill=ink, width=2)


def _drafts(context: Context, bill: Bill, amount: Region) -> list[Draft]:
    rng = context.rng
    drafts = [ask(rng, "field.price", money(price), item=item) for _, item, price in bill.items]
    drafts += [
        ask(rng, "field.total", money(bill.total)),
        ask(rng, "field.shop", bill.shop),
        ask(rng, "field.date", bill.date),
        ask(rng, "ground.thing", amount, thing="total"),
    ]
    drafts += [ask(rng, "field.number", bill.number)] if bill.number else []
    drafts += [ask(rng, "field.extra", money(bill.extra[1]), label=bill.extra[0])] if bill.extra else []
    return drafts


def draw_ticket(context: Context) -> Drawing:
    """Three big lines, two items and their total: the receipt of the simple world."""
    layout = align, gap, rule = context.layout("ticket")
    rng = context.rng
    paper, ink = context.colours()
    canvas = Canvas(*context.extent(0.8, 1.25), paper)
    amounts = [cents(rng, 450) for _ in range(2)]
    labels = [*context.words(2, "item"), context.cased("total")]
    prices = [money(amount) for amount in [*amounts, sum(amounts)]]
    regions = _print_ticket(canvas, context, labels, prices, (align, gap, rule), ink)
    lines = [f"{label} {price}" for label, price in zip(labels, prices, strict=True)]
    drafts = [ask(rng, "field.price", price, item=label) for label, price in zip(labels[:2], prices, strict=False)]
    drafts += [ask(rng, "field.total", prices[2]), ask(rng, "ground.thing", regions[2], thing="total")]
    for row, line in enumerate(lines):
        place = {"number": str(row + 1), "ordinal": ORDINALS[row]}
        drafts.append(ask(rng, "read.line", line, **place))
        drafts.append(ask(rng, "read.line_word", labels[row], which="first", **place))
    return Drawing(canvas, f"ticket: {'. '.join(lines)}.", drafts, layout)


def _print_ticket(
    canvas: Canvas,
    context: Context,
    labels: list[str],
    prices: list[str],
    style: tuple[str, str, str],
    ink: Colour,
) -> list[Region]:
    """Print the lines; return the regions of their prices."""
    align, gap, rule = style
    edge = context.pixels({"narrow": 22, "even": 34, "wide": 46}[gap])
    step = (canvas.height - edge) / 3
    most = min(56.0, 0.6 * step * 384 / context.size)
    fits = [context.fit(f"{a} {b} ", canvas.width - 2 * edge, most, True) for a, b in zip(labels, prices, strict=True)]
    face = min(fits, key=lambda one: one.size)
    _rule(canvas, rule, (edge, canvas.width - edge), round(edge / 2 + 2 * step), ink)
    regions = []
    for row, (label, price) in enumerate(zip(labels, prices, strict=True)):
        y = edge / 2 + step * (row + 0.5)
        canvas.number(canvas.text(label, edge, y, face, ink), row=row + 1, place=1)
        x = canvas.width - edge if align == "spread" else edge + face.width(f"{label} {price}")
        regions.append(canvas.text(price, x, y, face, ink, "r"))
        canvas.number(regions[-1], row=row + 1, place=2)
    return regions
