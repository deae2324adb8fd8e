"""Bar charts and line charts: values under labels, printed or to be read off the axis."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from convllava.synthetic.canvas import Canvas, Region
from convllava.synthetic.fonts import Font
from convllava.synthetic.palette import PAINTS, Colour, blend, contrasting, is_visible, jitter, luminance
from convllava.synthetic.questions import CHART_TITLES, Draft, ask, count
from convllava.synthetic.style import Context, Drawing
from convllava.synthetic.words import DAYS, MONTHS, QUARTERS

_COLOURS = ("red", "orange", "green", "blue", "purple", "pink", "brown", "grey")


@dataclass
class Plot:
    """The frame of a chart: its inner rectangle in pixels, the axis' top value and the look of its text."""

    left: float
    top: float
    right: float
    bottom: float
    highest: int
    face: Font
    ink: Colour
    horizontal: bool = False

    def place(self, share: float, value: float) -> tuple[float, float]:
        """The pixel at `share` (0-1) along the categories and at `value` on the axis."""
        rise = value / self.highest
        if self.horizontal:
            return self.left + rise * (self.right - self.left), self.top + share * (self.bottom - self.top)
        return self.left + share * (self.right - self.left), self.bottom - rise * (self.bottom - self.top)


@dataclass
class Data:
    """What a chart shows: distinct labels, a value for each, and perhaps a title."""

    labels: list[str]
    values: list[int]
    title: str


def draw_bar_chart(context: Context) -> Drawing:
    """A chart of three to six bars, upright or lying."""
    layout = bars, values, title, grid, colours = context.layout("bar_chart")
    if context.simple:
        bars, values, title = "vertical", "outside", "none"
    data = _data(context, title, values)
    paper, ink = context.colours(dark=0.12)
    canvas = Canvas(*context.extent(*((0.8, 1.25) if context.simple else (0.55, 1.3))), paper)
    plot = _frame(canvas, context, data, (paper, ink), grid, horizontal=bars == "horizontal")
    fills = _fills(context, paper, colours, len(data.values))
    drawn, shown = [], []
    for number, (value, fill) in enumerate(zip(data.values, fills, strict=True)):
        drawn.append(_bar(canvas, plot, (number, len(fills)), value, fill, 0.3 if bars == "slim" else 0.36))
        shown.append(_bar_value(canvas, plot, (number, len(fills)), value, PAINTS[fill], values))
    _number(canvas, data, drawn, shown)
    drafts = [*_drafts(context.rng, data, "bar", drawn, shown), count(context.rng, "count.bars", drawn)]
    return Drawing(canvas, _caption("bar chart", data), drafts, layout, steepest=2.0)


def _data(context: Context, title: str, values: str) -> Data:
    rng = context.rng
    number = rng.randint(2, 3) if context.simple else rng.randint(3, 6)
    numbers = [rng.randint(1, 20) * 5 if values == "axis" else rng.randint(3, 99) for _ in range(number)]
    return Data(_labels(context, number), numbers, rng.choice(CHART_TITLES) if title == "top" else "")


def _labels(context: Context, count: int) -> list[str]:
    """Months, days, quarters, years, letters or short words, in their natural order."""
    rng = context.rng
    series: list[tuple[str, ...]] = [MONTHS, DAYS]
    if not context.simple:
        first = rng.randint(1990, 2024)
        series += [tuple(str(first + step) for step in range(8)), tuple("ABCDEFGH")]
        series += [QUARTERS] if count <= 4 else []
    if not context.simple and rng.random() < 0.5:
        return context.words(count, rng.choice(("item", "name", "noun")), longest=4 if count > 4 else 5)
    chosen = rng.choice(series)
    start = rng.randint(0, len(chosen) - count)
    return list(chosen[start : start + count])


def _fills(context: Context, paper: Colour, colours: str, count: int) -> list[str]:
    """A visible colour for each bar, the same for all or one each; on some papers two may share one."""
    names = [name for name in _COLOURS if is_visible(name, paper)]
    return [context.rng.choice(names)] * count if colours == "one" else context.rng.sample(2 * names, count)


def _line_colour(context: Context, paper: Colour) -> str:
    """A colour that a thin line needs: not only another hue, but lighter or darker than the paper."""
    names = [name for name in _COLOURS if abs(luminance(PAINTS[name]) - luminance(paper)) > 45]
    return context.rng.choice(names)


def _frame(
    canvas: Canvas,
    context: Context,
    data: Data,
    colours: tuple[Colour, Colour],
    grid: str,
    horizontal: bool = False,
) -> Plot:
    """Draw title, axes, ticks, gridlines and labels; return where the values go."""
    paper, ink = colours
    face, edge = context.regular(context.rng.uniform(*((30, 36) if context.simple else (17, 22)))), context.pixels(10)
    top = edge + _title(canvas, context, data.title, edge, ink)
    highest, step = _scale(max(data.values))
    row = face.size * 1.5
    if horizontal:
        left = edge + max(face.width(label) for label in data.labels) + edge
    else:
        left = edge if context.simple else edge + face.width(str(highest)) + edge
    room = canvas.width - left - edge - (0 if context.simple else face.width(str(highest)) / 2)
    face = _narrowed(context, face, data.labels, room / len(data.labels) * 0.94) if not horizontal else face
    plot = Plot(left, top + row, left + room, canvas.height - edge - row, highest, face, ink, horizontal)
    if not context.simple:
        _ticks(canvas, plot, step, (blend(paper, ink, 0.2), ink), grid)
    canvas.draw.line((plot.left, plot.top, plot.left, plot.bottom, plot.right, plot.bottom), fill=ink, width=2)
    _category_labels(canvas, plot, data.labels)
    return plot


def _narrowed(context: Context, face: Font, labels: list[str], room: float) -> Font:
    widest = max(labels, key=face.width)
    return context.fit(widest, room, face.size * 384 / context.size)


def _title(canvas: Canvas, context: Context, title: str, edge: int, ink: Colour) -> float:
    if not title:
        return 0
    face = context.fit(title, canvas.width - 2 * edge, 28, bold=True)
    canvas.text(title, canvas.width / 2, edge + face.size / 2, face, ink, "m")
    return face.size * 1.3


def _scale(most: int) -> tuple[int, int]:
    """The axis' top value and the step of its ticks."""
    step = next(step for step in (2, 5, 10, 20, 25) if most <= 5 * step)
    return -(-most // step) * step, step


def _ticks(canvas: Canvas, plot: Plot, step: int, colours: tuple[Colour, Colour], grid: str) -> None:
    faint, ink = colours
    for value in range(0, plot.highest + 1, step):
        start, end = plot.place(0, value), plot.place(1, value)
        if grid == "grid":
            canvas.draw.line((*start, *end), fill=faint)
        if plot.horizontal:
            canvas.draw.line((start[0], plot.bottom, start[0], plot.bottom + 4), fill=ink)
            canvas.text(str(value), start[0], plot.bottom + plot.face.size * 0.8, plot.face, ink, "m")
        else:
            canvas.draw.line((plot.left - 4, start[1], plot.left, start[1]), fill=ink)
            canvas.text(str(value), plot.left - 7, start[1], plot.face, ink, "r")


def _category_labels(canvas: Canvas, plot: Plot, labels: list[str]) -> None:
    for number, label in enumerate(labels):
        x, y = plot.place((number + 0.5) / len(labels), 0)
        if plot.horizontal:
            region = canvas.text(label, plot.left - 7, y, plot.face, plot.ink, "r")
        else:
            region = canvas.text(label, x, plot.bottom + plot.face.size * 0.85, plot.face, plot.ink, "m")
        canvas.number(region, place=number + 1)


def _bar(canvas: Canvas, plot: Plot, slot: tuple[int, int], value: int, fill: str, half: float) -> Region:
    number, count = slot
    first, last = (
        plot.place((number + 0.5 - half) / count, 0),
        plot.place((number + 0.5 + half) / count, value),
    )
    x0, x1 = sorted((round(first[0]), round(last[0])))
    y0, y1 = sorted((round(first[1]), round(last[1])))
    return canvas.bar(fill, PAINTS[fill], (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))


def _bar_value(
    canvas: Canvas, plot: Plot, slot: tuple[int, int], value: int, fill: Colour, style: str
) -> Region | None:
    """Print a bar's value, unless it is to be read off the axis."""
    if style == "axis":
        return None
    number, count = slot
    x, y = plot.place((number + 0.5) / count, value)
    text, gap = str(value), plot.face.size * 0.7
    depth = abs(x - plot.left) if plot.horizontal else plot.bottom - y
    inside = style == "inside" and depth > plot.face.width(text) + gap
    ink = contrasting(fill) if inside else plot.ink
    if plot.horizontal:
        return canvas.text(text, x - gap / 2 if inside else x + gap / 2, y, plot.face, ink, "r" if inside else "l")
    return canvas.text(text, x, y + gap if inside else y - gap, plot.face, ink, "m")


def draw_line_chart(context: Context) -> Drawing:
    """A line through three to six marked points."""
    layout = marker, values, title, grid, frame = context.layout("line_chart")
    data = _data(context, title, values)
    paper, ink = context.colours(dark=0.12)
    canvas = Canvas(*context.extent(0.55, 1.1), paper)
    plot = _frame(canvas, context, data, (paper, ink), grid)
    if frame == "closed":
        canvas.draw.rectangle((plot.left, plot.top, plot.right, plot.bottom), outline=ink)
    colour = _line_colour(context, paper)
    points = [plot.place((number + 0.5) / len(data.values), value) for number, value in enumerate(data.values)]
    canvas.draw.line(points, fill=PAINTS[colour], width=context.pixels(context.rng.randint(2, 4)), joint="curve")
    markers = [_marker(canvas, context, point, marker, colour) for point in points]
    shown: list[Region | None] = [None] * len(points)
    for number, value in enumerate(data.values if values != "axis" else ()):
        y = points[number][1] + plot.face.size * (0.95 if _valley(plot, points, number) else -0.95)
        plate = paper if values == "boxed" else None
        shown[number] = _point_value(canvas, plot, (points[number][0], y), str(value), plate)
    _number(canvas, data, markers, shown)
    drafts = [*_drafts(context.rng, data, "point", markers, shown), count(context.rng, "count.points", markers)]
    return Drawing(canvas, _caption("line chart", data), drafts, layout, steepest=2.0)


def _valley(plot: Plot, points: list[tuple[float, float]], number: int) -> bool:
    """Whether the line rises from this point on balance and there is room below it for its value."""
    around = [points[place][1] for place in (number - 1, number + 1) if 0 <= place < len(points)]
    y = points[number][1]
    return y - sum(around) / len(around) > 0 and y + 1.6 * plot.face.size < plot.bottom


def _marker(canvas: Canvas, context: Context, point: tuple[float, float], marker: str, colour: str) -> Region:
    side = context.pixels(11) // 2 * 2
    x, y = round(point[0]) - side // 2, round(point[1]) - side // 2
    return canvas.shape(marker, colour, jitter(context.rng, PAINTS[colour], 5), (x, y, x + side, y + side))


def _point_value(canvas: Canvas, plot: Plot, point: tuple[float, float], text: str, plate: Colour | None) -> Region:
    x, y = point
    half, rise = plot.face.width(text) / 2 + 2, plot.face.capital / 2 + 3
    if plate:
        canvas.draw.rectangle((x - half, y - rise, x + half, y + rise), fill=plate, outline=plot.ink)
    return canvas.text(text, x, y, plot.face, plot.ink, "m")


def _number(canvas: Canvas, data: Data, pieces: Sequence[Region], shown: Sequence[Region | None]) -> None:
    """Number a chart's bars or points, with their values, and these where they are printed."""
    for place, (value, *regions) in enumerate(zip(data.values, pieces, shown, strict=True), start=1):
        for region in filter(None, regions):
            canvas.number(region, place=place, value=value)


def _caption(kind: str, data: Data) -> str:
    title = f"title {data.title}. " if data.title else ""
    pairs = ", ".join(f"{label} {value}" for label, value in zip(data.labels, data.values, strict=True))
    return f"{kind}: {title}{pairs}."


def _drafts(
    rng: random.Random, data: Data, piece: str, pieces: Sequence[Region], shown: Sequence[Region | None]
) -> list[Draft]:
    """Values of labels, and the extremes where only one label has them; read where they are printed, else from the
    bars or points."""
    read = [drawn if text is None else text for drawn, text in zip(pieces, shown, strict=True)]
    drafts = [
        ask(rng, "chart.value", str(value), label=label).read_from(region)
        for label, value, region in zip(data.labels, data.values, read, strict=True)
    ]
    extremes: tuple[tuple[str, str, Callable[[list[int]], int]], ...] = (
        ("highest", "maximum", max),
        ("lowest", "minimum", min),
    )
    for place, key, pick in extremes:
        extreme = pick(data.values)
        extremes_at = [region for value, region in zip(data.values, read, strict=True) if value == extreme]
        drafts.append(ask(rng, f"chart.{key}", str(extreme)).read_from(*extremes_at))
        if data.values.count(extreme) == 1:
            drafts.append(ask(rng, f"chart.{piece}_{place}", data.labels[data.values.index(extreme)]))
    return drafts + ([ask(rng, "chart.title", data.title)] if data.title else [])
