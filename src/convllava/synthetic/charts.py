"""Bar charts and line charts: labelled values that are printed or must be read from the axis."""

from collections.abc import Sequence
from dataclasses import dataclass

from convllava.synthetic.canvas import Canvas, Colour, Region
from convllava.synthetic.fonts import Font
from convllava.synthetic.questions import CHART_TITLES, Draft, ask, count
from convllava.synthetic.style import PAINTS, Context, Drawing, blend, contrasting, is_visible, jitter, luminance
from convllava.synthetic.words import DAYS, MONTHS, QUARTERS

_COLOURS = ("red", "orange", "green", "blue", "purple", "pink", "brown", "grey")


@dataclass
class Plot:
    """The frame of a chart: its inner rectangle in pixels, the top value of the axis, and the look of its text."""

    left: float
    top: float
    right: float
    bottom: float
    highest: int
    face: Font
    ink: Colour
    horizontal: bool = False

    def place(self, share: float, value: float) -> tuple[float, float]:
        """Return the pixel at `share` (0-1) along the categories and at `value` on the axis."""
        rise = value / self.highest
        if self.horizontal:
            return self.left + rise * (self.right - self.left), self.top + share * (self.bottom - self.top)
        return self.left + share * (self.right - self.left), self.bottom - rise * (self.bottom - self.top)


@dataclass
class Data:
    """The content of a chart: distinct labels, a value for each, and a title or ""."""

    labels: list[str]
    values: list[int]
    title: str


def draw_bar_chart(context: Context) -> Drawing:
    """Draw a chart of three to six vertical or horizontal bars."""
    layout = bars, values, title, grid, colours = context.layout("bar_chart")
    if context.simple:
        bars, values, title = "vertical", "outside", "none"
    data = _data(context, title, values)
    paper, ink = context.colours(dark=0.12)
    canvas = Canvas(*context.extent(*((0.8, 1.25) if context.simple else (0.55, 1.3))), paper)
    plot = _frame(canvas, context, data, (paper, ink), grid, horizontal=bars == "horizontal")

    number = len(data.values)
    visible = [name for name in _COLOURS if is_visible(name, paper)]
    # All bars in one colour, or each in its own; if few colours are visible, two bars can share one.
    fills = [context.rng.choice(visible)] * number if colours == "one" else context.rng.sample(2 * visible, number)
    half, gap = 0.3 if bars == "slim" else 0.36, plot.face.size * 0.7
    drawn: list[Region] = []
    printed: list[Region | None] = []
    for place, (value, fill) in enumerate(zip(data.values, fills, strict=True)):
        first, last = plot.place((place + 0.5 - half) / number, 0), plot.place((place + 0.5 + half) / number, value)
        x0, x1 = sorted((round(first[0]), round(last[0])))
        y0, y1 = sorted((round(first[1]), round(last[1])))
        drawn.append(canvas.bar(fill, PAINTS[fill], (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))))
        if values == "axis":
            printed.append(None)
            continue
        x, y = plot.place((place + 0.5) / number, value)
        depth = abs(x - plot.left) if plot.horizontal else plot.bottom - y
        inside = values == "inside" and depth > plot.face.width(str(value)) + gap
        colour = contrasting(PAINTS[fill]) if inside else plot.ink
        if plot.horizontal:
            x, anchor = (x - gap / 2, "r") if inside else (x + gap / 2, "l")
        else:
            y, anchor = (y + gap if inside else y - gap), "m"
        printed.append(canvas.text(str(value), x, y, plot.face, colour, anchor))
    return _finish("bar", canvas, context, data, drawn, printed, layout)


def draw_line_chart(context: Context) -> Drawing:
    """Draw a line through three to six marked points."""
    layout = marker, values, title, grid, frame = context.layout("line_chart")
    data = _data(context, title, values)
    paper, ink = context.colours(dark=0.12)
    canvas = Canvas(*context.extent(0.55, 1.1), paper)
    plot = _frame(canvas, context, data, (paper, ink), grid)
    if frame == "closed":
        canvas.draw.rectangle((plot.left, plot.top, plot.right, plot.bottom), outline=ink)

    # A thin line needs a colour that is lighter or darker than the paper; another hue is not enough.
    colour = context.rng.choice([name for name in _COLOURS if abs(luminance(PAINTS[name]) - luminance(paper)) > 45])
    points = [plot.place((number + 0.5) / len(data.values), value) for number, value in enumerate(data.values)]
    canvas.draw.line(points, fill=PAINTS[colour], width=context.pixels(context.rng.randint(2, 4)), joint="curve")
    side = context.pixels(11) // 2 * 2
    markers: list[Region] = []
    for point in points:
        x, y = round(point[0]) - side // 2, round(point[1]) - side // 2
        shade = jitter(context.rng, PAINTS[colour], 5)
        markers.append(canvas.shape(marker, colour, shade, (x, y, x + side, y + side)))

    printed: list[Region | None] = [None] * len(points)
    for number, value in enumerate(data.values if values != "axis" else ()):
        middle, height = points[number]
        around = [points[place][1] for place in (number - 1, number + 1) if 0 <= place < len(points)]
        # Below the point if the line rises from here on both sides and there is room, otherwise above it.
        below = height - sum(around) / len(around) > 0 and height + 1.6 * plot.face.size < plot.bottom
        height += plot.face.size * (0.95 if below else -0.95)
        if values == "boxed":
            half, rise = plot.face.width(str(value)) / 2 + 2, plot.face.capital / 2 + 3
            canvas.draw.rectangle(
                (middle - half, height - rise, middle + half, height + rise), fill=paper, outline=plot.ink
            )
        printed[number] = canvas.text(str(value), middle, height, plot.face, plot.ink, "m")
    return _finish("point", canvas, context, data, markers, printed, layout)


def _data(context: Context, title: str, values: str) -> Data:
    """Choose values, and as labels months, days, quarters, years, letters or short words, in their natural order."""
    rng = context.rng
    number = rng.randint(2, 3) if context.simple else rng.randint(3, 6)
    numbers = [rng.randint(1, 20) * 5 if values == "axis" else rng.randint(3, 99) for _ in range(number)]
    series: list[tuple[str, ...]] = [MONTHS, DAYS]
    if not context.simple:
        first = rng.randint(1990, 2024)
        series += [tuple(str(first + step) for step in range(8)), tuple("ABCDEFGH")]
        series += [QUARTERS] if number <= 4 else []
    if not context.simple and rng.random() < 0.5:
        labels = context.words(number, rng.choice(("item", "name", "noun")), longest=4 if number > 4 else 5)
    else:
        chosen = rng.choice(series)
        start = rng.randint(0, len(chosen) - number)
        labels = list(chosen[start : start + number])
    return Data(labels, numbers, rng.choice(CHART_TITLES) if title == "top" else "")


def _frame(
    canvas: Canvas, context: Context, data: Data, colours: tuple[Colour, Colour], grid: str, horizontal: bool = False
) -> Plot:
    """Draw title, axes, ticks, grid lines and labels. Return the frame for the values."""
    paper, ink = colours
    face, edge = context.regular(context.rng.uniform(*((30, 36) if context.simple else (17, 22)))), context.pixels(10)
    top = float(edge)
    if data.title:
        bold = context.fit(data.title, canvas.width - 2 * edge, 28, bold=True)
        canvas.text(data.title, canvas.width / 2, edge + bold.size / 2, bold, ink, "m")
        top = edge + bold.size * 1.3
    most = max(data.values)
    step = next(step for step in (2, 5, 10, 20, 25) if most <= 5 * step)
    highest = -(-most // step) * step
    row = face.size * 1.5
    if horizontal:
        left = edge + max(face.width(label) for label in data.labels) + edge
    else:
        left = edge if context.simple else edge + face.width(str(highest)) + edge
    room = canvas.width - left - edge - (0 if context.simple else face.width(str(highest)) / 2)
    if not horizontal:
        widest = max(data.labels, key=face.width)
        face = context.fit(widest, room / len(data.labels) * 0.94, face.size * 384 / context.size)
    plot = Plot(left, top + row, left + room, canvas.height - edge - row, highest, face, ink, horizontal)

    for value in () if context.simple else range(0, highest + 1, step):
        start, end = plot.place(0, value), plot.place(1, value)
        if grid == "grid":
            canvas.draw.line((*start, *end), fill=blend(paper, ink, 0.2))
        if horizontal:
            canvas.draw.line((start[0], plot.bottom, start[0], plot.bottom + 4), fill=ink)
            canvas.text(str(value), start[0], plot.bottom + face.size * 0.8, face, ink, "m")
        else:
            canvas.draw.line((plot.left - 4, start[1], plot.left, start[1]), fill=ink)
            canvas.text(str(value), plot.left - 7, start[1], face, ink, "r")
    canvas.draw.line((plot.left, plot.top, plot.left, plot.bottom, plot.right, plot.bottom), fill=ink, width=2)
    for number, label in enumerate(data.labels):
        x, y = plot.place((number + 0.5) / len(data.labels), 0)
        if horizontal:
            region = canvas.text(label, plot.left - 7, y, face, ink, "r")
        else:
            region = canvas.text(label, x, plot.bottom + face.size * 0.85, face, ink, "m")
        canvas.number(region, place=number + 1)
    return plot


def _finish(
    piece: str,
    canvas: Canvas,
    context: Context,
    data: Data,
    drawn: Sequence[Region],
    printed: Sequence[Region | None],
    layout: tuple[str, ...],
) -> Drawing:
    """Add numbers, questions and a caption to a chart whose `drawn` pieces are bars ("bar") or points ("point").

    `printed` holds the printed value of each piece, or None if it must be read from the axis.
    """
    rng = context.rng
    for place, (value, *regions) in enumerate(zip(data.values, drawn, printed, strict=True), start=1):
        for region in filter(None, regions):
            canvas.number(region, place=place, value=value)

    # A value is read from its printed number, or from its bar or point.
    shown = [mark if text is None else text for mark, text in zip(drawn, printed, strict=True)]
    drafts: list[Draft] = [
        ask(rng, "chart.value", str(value), label=label).read_from(region)
        for label, value, region in zip(data.labels, data.values, shown, strict=True)
    ]
    most, least = max(data.values), min(data.values)
    for name, key, extreme in (("highest", "maximum", most), ("lowest", "minimum", least)):
        extremes_at = [region for value, region in zip(data.values, shown, strict=True) if value == extreme]
        drafts.append(ask(rng, f"chart.{key}", str(extreme)).read_from(*extremes_at))
        if data.values.count(extreme) == 1:
            drafts.append(ask(rng, f"chart.{piece}_{name}", data.labels[data.values.index(extreme)]))
    if data.title:
        drafts.append(ask(rng, "chart.title", data.title))
    drafts.append(count(rng, f"count.{piece}s", drawn))

    title = f"title {data.title}. " if data.title else ""
    pairs = ", ".join(f"{label} {value}" for label, value in zip(data.labels, data.values, strict=True))
    kind = "bar chart" if piece == "bar" else "line chart"
    return Drawing(canvas, f"{kind}: {title}{pairs}.", drafts, layout, max_rotation=2.0)
